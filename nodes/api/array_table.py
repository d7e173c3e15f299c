"""Columns of numbers by name, as numpy arrays or as a data frame."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Column = NDArray[Any]


class ArrayTable(Mapping[str, Column]):
    """Arrays of equal length by name.

    Args:
        columns: the arrays by name.
        what: what one row is, such as "evaluation".
    """

    def __init__(self, columns: Mapping[str, Column], what: str) -> None:
        self._columns = dict(columns)
        self._what = what

    @classmethod
    def of_rows(
        cls, rows: Iterable[Mapping[str, Any]], what: str, names: Iterable[str] = ()
    ) -> ArrayTable:
        """Make a table from rows.

        Args:
            rows: values by column; a value that is None or missing becomes NaN.
            what: what one row is.
            names: columns that come first, and are there even if no row has them.
        """
        found = list(rows)
        columns = dict.fromkeys([*names, *(name for row in found for name in row)])
        return cls({name: _array([row.get(name) for row in found]) for name in columns}, what)

    def __getitem__(self, name: str) -> Column:
        if name not in self._columns:
            raise KeyError(f"there is no column {name!r}; choose from {', '.join(self._columns)}")
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        """Return the number of columns."""
        return len(self._columns)

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self._columns.values()), ()))

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame`.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise ImportError(
                "to_pandas needs pandas, which is not installed: pip install pandas"
            ) from None
        return pd.DataFrame(self._columns)

    def __repr__(self) -> str:
        plural = "" if self.rows == 1 else "s"
        return f"<{self.rows} {self._what}{plural}: {', '.join(self._columns)}>"


def _array(values: list[Any]) -> Column:
    """Return whole numbers as int64, texts as objects, and all else as float64."""
    if any(isinstance(each, str) for each in values):
        return np.array(values, dtype=object)
    if values and all(type(each) is int for each in values):
        return np.array(values, dtype=np.int64)
    return np.array([np.nan if each is None else each for each in values], dtype=np.float64)
