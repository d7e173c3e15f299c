"""The final model as files: it loads strictly into the problem's module."""

import json
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.registry import find_algorithm
from fedmq.nodes.errors import NodeError
from fedmq.nodes.run_folder import model_files
from fedmq.nodes.run_folder.model_files import read_state_dict, remove_model, save_model
from tests.algorithms.tiny import Normed, Tiny

ABOUT = {"run": "r", "version": "3"}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.b.weight = self.a.weight
        self.register_buffer("mask", torch.full((2,), -torch.inf), persistent=False)
        self.register_buffer("steps", torch.tensor(3, dtype=torch.int32))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("table", torch.arange(3).bfloat16())
        self.register_buffer("halves", torch.arange(3).half())
        self.register_buffer("wide", torch.arange(3).double())
        self.register_buffer("turns", torch.polar(torch.ones(3), torch.arange(3.0)))
        self.register_buffer("exact", torch.tensor([1 / 3 + 2j / 3], dtype=torch.complex128))
        self.register_buffer("empty", torch.zeros(0, 3))

    def forward(self, x):
        return self.b(self.a(x))


class Names(nn.Module):
    """Names that the formats reserve, or that equal the name of a converted tensor."""

    def __init__(self):
        super().__init__()
        for name in (
            "file",
            "args",
            "allow_pickle",
            "__metadata__",
            "__metadata__ ",
            "größe",
            "complex",
        ):
            self.register_parameter(name, nn.Parameter(torch.randn(2)))
        self.register_buffer("c", torch.tensor([1 + 2j], dtype=torch.complex128))
        self.register_module("c_", nn.Linear(1, 1))


class Wrapped(nn.Module):
    """A state dict with other keys than the parameters, and a state that is no tensor."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))

    def get_extra_state(self):
        return torch.tensor([7.0])

    def set_extra_state(self, state):
        assert state.item() == 7.0


def problem_of(kind):
    class Own(Tiny):
        def module(self):
            return kind()

    return Own()


def saved(folder, problem, move=0.5):
    """Save a trained model; return the algorithm's tensors by name."""
    algorithm = FedAvg()
    state = algorithm.start(problem)
    state.weights[: state.layout.parameters] += move
    tensors = algorithm.tensors(state)
    save_model(folder, tensors, problem, ABOUT)
    return tensors


@pytest.mark.parametrize(
    "kind", [Tied, Names, Wrapped, lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))]
)
def test_the_model_loads_strictly_into_its_own_module(tmp_path, kind):
    problem = problem_of(kind)
    tensors = saved(tmp_path, problem)
    state = read_state_dict(tmp_path)
    module = problem.model()
    wanted = module.state_dict()
    assert set(state) == set(wanted)
    assert {n: (e.dtype, e.shape) for n, e in state.items()} == {
        n: (e.dtype, e.shape) for n, e in wanted.items()
    }
    module.load_state_dict(state, strict=True)
    for name, each in (dict(module.named_parameters()) | dict(module.named_buffers())).items():
        assert torch.equal(each.to(tensors[name].dtype), tensors[name]), name
    assert not list(tmp_path.glob("*.new"))
    modes = {each.stat().st_mode for each in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 2
    assert len(modes) == 1


def test_safetensors_alone_reads_a_file_without_converted_tensors(tmp_path):
    problem = Normed()
    saved(tmp_path, problem)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    problem.model().load_state_dict(state, strict=True)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["fedmq"]) == {"holds": "module", **ABOUT}


def test_the_metadata_list_converted_tensors(tmp_path):
    saved(tmp_path, problem_of(Tied))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        notes = json.loads(opened.metadata()["fedmq"])
        assert notes["complex"] == {
            "exact": {"dtype": "complex128", "real": "exact.real", "imag": "exact.imag"}
        }
        assert opened.get_tensor("exact.imag").dtype == torch.float64
        assert opened.get_tensor("table").dtype == torch.bfloat16
        assert "mask" not in opened.keys()  # noqa: SIM118 - it is no dict
        assert torch.equal(opened.get_tensor("a.weight"), opened.get_tensor("b.weight"))
    saved(tmp_path, problem_of(Names))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        renamed = json.loads(opened.metadata()["fedmq"])["renamed"]
    assert list(renamed.values()) == ["__metadata__"]


def test_complex64_is_converted_if_safetensors_does_not_support_it(tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "_can_hold", lambda dtype: not dtype.is_complex)
    problem = problem_of(Tied)
    tensors = saved(tmp_path, problem)
    state = read_state_dict(tmp_path)
    assert state["turns"].dtype == torch.complex64
    assert torch.equal(state["turns"], tensors["turns"])
    problem.model().load_state_dict(state, strict=True)


def test_the_arrays_have_the_algorithms_names(tmp_path):
    tensors = saved(tmp_path, problem_of(Names))
    with np.load(tmp_path / "model.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == set(tensors)
        assert np.array_equal(arrays["file"], tensors["file"].numpy())
    tensors = saved(tmp_path, problem_of(Tied))
    with np.load(tmp_path / "model.npz", allow_pickle=False) as arrays:
        assert arrays["table"].dtype == np.float32
        assert arrays["exact"].dtype == np.complex128


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedgkt", "pfedhn", "fd", "fedper"])
def test_a_model_that_is_not_the_problems_module_is_saved_by_tensor_name(tmp_path, name):
    class Pictures(Tiny):
        shape, classes = (1, 8, 8), 2

        def module(self):
            layers = OrderedDict(flat=nn.Flatten(), first=nn.Linear(64, 4), last=nn.Linear(4, 2))
            return nn.Sequential(layers)

    problem = Pictures()
    algorithm = find_algorithm(name)()
    tensors = algorithm.tensors(algorithm.start(problem))
    save_model(tmp_path, tensors, problem, ABOUT)
    state = read_state_dict(tmp_path)
    assert set(state) == set(tensors)
    assert all(torch.equal(each, state[key]) for key, each in tensors.items())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert json.loads(opened.metadata()["fedmq"])["holds"] == "tensors"


class Stubborn(nn.Linear):
    def state_dict(self, *args, **options):
        raise ZeroDivisionError


def test_a_module_whose_state_dict_raises_is_saved_by_tensor_name(tmp_path):
    problem = problem_of(lambda: Stubborn(2, 2))
    tensors = saved(tmp_path, problem)
    assert set(read_state_dict(tmp_path / "model.safetensors")) == set(tensors)


def test_an_old_model_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    problem = Normed()
    saved(tmp_path, problem)
    before = read_state_dict(tmp_path)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(NodeError, match=r"cannot write the model to .*: no space left on device"):
        saved(tmp_path, problem, 2.0)
    after = read_state_dict(tmp_path)
    assert all(torch.equal(each, after[name]) for name, each in before.items())
    assert not list(tmp_path.glob("*.new"))


def test_a_file_that_is_no_model_is_an_error(tmp_path):
    with pytest.raises(NodeError, match="there is no such file"):
        read_state_dict(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"no model")
    with pytest.raises(NodeError, match="cannot read the model in"):
        read_state_dict(file)
    for notes in ("no JSON", '{"renamed": {"x": "y"}}', '{"complex": 3}', '{"complex": {"x": {}}}'):
        safetensors.torch.save_file({"w": torch.zeros(1)}, file, metadata={"fedmq": notes})
        with pytest.raises(NodeError, match="its notes are damaged"):
            read_state_dict(file)


def test_another_programs_file_is_read_without_conversion(tmp_path):
    file = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(1)}, file)
    assert set(read_state_dict(str(file))) == {"w"}


def test_files_of_another_run_are_removed(tmp_path):
    remove_model(tmp_path)
    saved(tmp_path, Normed())
    remove_model(tmp_path)
    assert not list(tmp_path.iterdir())
