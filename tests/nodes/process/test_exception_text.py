"""Exception text leaves the process without data, as one line of bounded length."""

import errno

import numpy as np
import pytest
import torch

from fedmq.nodes.errors import ConfigError, OwnCodeError, own_code
from fedmq.nodes.process.exception_text import (
    clip_text,
    described,
    explained,
    may_pass,
    modules_of,
    place_in,
)

DATA = torch.arange(40.0).reshape(5, 8) + 0.125


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"bad {DATA} here", "bad tensor(...) here"),
        (f"bad {DATA.double()} here", "bad tensor(...) here"),
        (f"bad {torch.nn.Parameter(DATA)}", "bad Parameter containing: tensor(...)"),
        (f"bad {DATA.numpy()!r} here", "bad array(...) here"),
        (f"bad {DATA.numpy()} here", "bad [...] here"),
        (f"bad {DATA[0].numpy()} here", "bad [...] here"),
        (f"bad {DATA.tolist()} here", "bad [...] here"),
        (f"bad {({'x': DATA},)} here", "bad ({'x': tensor(...)},) here"),
        (f"bad {torch.randn(2000, 9)} here", "bad tensor(...) here"),
        (f"tokens {list(range(100, 120))}", "tokens [...]"),
        ("row [0.5, nan]", "row [...]"),
        ("row [-1e-3 2.5e+4]", "row [...]"),
        (f"cut {str(DATA)[:60]}", "cut tensor(...)"),
    ],
)
def test_values_of_tensors_and_lists_are_elided(text, shown):
    assert clip_text(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "mat1 and mat2 shapes cannot be multiplied (16x8 and 9x2)",
        "expected [64, 3, 7, 7], got torch.Size([64, 3, 5, 5])",
        "loss is tensor(nan)",
        "key 'a[0.5]' of ['x', 'y'] is missing",
        "unbalanced ] of (brackets [",
    ],
)
def test_shapes_and_words_stay(text):
    assert clip_text(text) == text


def test_a_text_is_one_line_of_bounded_length():
    assert clip_text("a\n\tb  c") == "a b c"
    assert len(clip_text("x" * 10**7)) == 500
    assert clip_text("x" * 600).endswith("x...")


def test_an_exception_whose_str_raises_is_described_by_its_type():
    class Mute(Exception):
        def __str__(self):
            raise ValueError

    assert described(Mute()) == "Mute"
    assert described(KeyError()) == "KeyError"
    assert described(ValueError("no")) == "ValueError: no"


def raised(function):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - any
        function()
    return caught.value


def test_the_place_is_the_innermost_frame_of_the_users_code():
    line = raised.__code__.co_firstlineno

    def model():
        torch.nn.Linear(3, 2)(DATA)

    error = raised(model)
    assert line < int(place_in(error).rpartition(":")[2]) < line + 20
    assert place_in(error).rpartition(":")[0].endswith("process/test_exception_text.py")
    assert explained(error).endswith(f"({place_in(error)})")


@pytest.mark.parametrize(
    ("model", "place"),
    [
        (torch.nn.Linear(3, 2), "Linear(in_features=3, out_features=2, bias=True)"),
        (
            torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Sequential(torch.nn.Linear(3, 2))),
            "layer '1.0', Linear(in_features=3, out_features=2, bias=True)",
        ),
    ],
)
def test_without_a_frame_of_the_users_the_layer_is_named(model, place):
    error = raised(lambda: model(DATA))
    trace = error.__traceback__
    while trace.tb_frame.f_globals["__name__"].partition(".")[0] != "torch":
        trace = trace.tb_next  # as if called from this package
    assert place_in(error.with_traceback(trace)) == place


def test_frames_of_libraries_and_of_fedmq_are_not_the_users():
    error = raised(lambda: None.x)
    error.__traceback__ = None
    assert place_in(error) == ""
    error = raised(lambda: np.linalg.inv(np.zeros((2, 2))))
    assert "linalg" not in place_in(error)
    assert "numpy" in place_in(error, modules_of(np.linalg.LinAlgError())) or place_in(error)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (OSError(errno.ENOSPC, "no space"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (FileNotFoundError(errno.ENOENT, "none"), False),
        (RuntimeError("shapes"), False),
        (ValueError(), False),
    ],
)
def test_what_a_restart_may_cure_is_told_from_what_it_does_not(error, passes):
    assert may_pass(error) == passes
    kind = type(error) if passes else OwnCodeError
    with pytest.raises(kind), own_code("problem.name"):
        raise error


def test_errors_that_are_sentences_already_stay_as_they_are():
    with pytest.raises(ConfigError, match=r"^run.seed: no$"), own_code("problem.name"):
        raise ConfigError("run.seed: no")
    with (
        pytest.raises(OwnCodeError, match=r"^problem.name: KeyError: 'x' \(.*_text.py:\d+\)"),
        own_code("problem.name"),
    ):
        {}["x"]
