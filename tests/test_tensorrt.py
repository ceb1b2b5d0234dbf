"""TensorRT: the export, the cache, the gate before an engine, the command; builds without a GPU."""

import ctypes
import dataclasses
import logging
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import cuda_only, relative_error
from tiny_model import build_tiny_model

from dsd_fast import build_engine
from dsd_fast.diffusion import load_model
from dsd_fast.diffusion.condition import Condition
from dsd_fast.diffusion.engines import cache, make_engine, parity, tensorrt, tensorrt_library
from dsd_fast.diffusion.engines.base import EagerEngine, GraphEngine, UNetShape
from dsd_fast.diffusion.engines.onnx_export import export_unet

TINY = UNetShape((4, 8, 8), (("tokens", (77, 16)),))


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def tiny_unet(tiny_folder):
    return load_model(tiny_folder).unet


def fake_library(name="tensorrt_rtx", members=("SM80", "SM86", "SM89", "SM120"), version="1.0"):
    capabilities = SimpleNamespace(**{member: member for member in members})
    return SimpleNamespace(
        __version__=version,
        __name__=name,
        ComputeCapability=capabilities,
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
    )


@pytest.fixture
def only(monkeypatch):
    """only("tensorrt_rtx"): that is the one package that can be imported, and it does nothing."""

    def install(*names: str) -> None:
        for name in tensorrt_library.LIBRARIES:
            monkeypatch.setitem(sys.modules, name, fake_library(name) if name in names else None)

    return install


# ---- export -------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["tiny", "tiny, odd", "embedded"])
def test_onnx_computes_what_the_unet_computes(which, tiny_folder, tmp_path) -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = load_model("embedded" if which == "embedded" else tiny_folder)
    shape = TINY
    if which == "embedded":
        shape = build_engine.shape_of(_inspected("embedded"))
    elif which == "tiny, odd":
        shape = replace(TINY, latents=(4, 9, 11))
    path = export_unet(model.unet, shape, tmp_path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for rows in (1, 4, 8):
        latents, t, condition = inputs = shape.sample(rows, torch.float32, "cpu", seed=rows)
        named = {"latents": latents, "t": t, **condition}
        feed = {name: tensor.numpy() for name, tensor in named.items()}
        (result,) = session.run(None, feed)
        assert relative_error(torch.from_numpy(result), model.engine(*inputs)) <= 1e-4


def test_half_precision_weights_stay_in_half_precision(tiny_folder, tmp_path) -> None:
    onnx = pytest.importorskip("onnx")
    unet = load_model(tiny_folder).unet.half()
    graph = onnx.load(str(export_unet(unet, TINY, tmp_path))).graph
    half = onnx.TensorProto.FLOAT16
    assert all(w.data_type == half for w in graph.initializer if len(w.dims) >= 2)
    kinds = {entry.name: entry.type.tensor_type.elem_type for entry in graph.input}
    assert kinds == {"latents": half, "t": onnx.TensorProto.INT64, "tokens": half}
    assert graph.output[0].type.tensor_type.elem_type == half


def test_export_without_onnx_says_what_to_install(tiny_unet, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'dsd_fast\[tensorrt\]'"):
        export_unet(tiny_unet, TINY, tmp_path)


# ---- the gate -----------------------------------------------------------------------------------


def test_gate_passes_the_eager_engine_in_every_precision(tiny_folder) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        unet = load_model(tiny_folder, dtype=dtype).unet
        for float32 in (True, False):
            found = parity.measure(EagerEngine(unet), unet, TINY, 4, float32=float32)
            assert found.passed
            assert found.reference == (torch.float32 if float32 else dtype)
        assert parity.gate(EagerEngine(unet), unet, TINY, 4, "eager").passed


@pytest.mark.parametrize("wrong", ["scaled", "rows swapped", "level ignored", "nan"])
def test_gate_stops_a_wrong_engine(wrong, tiny_folder) -> None:
    unet = load_model(tiny_folder, dtype=torch.bfloat16).unet
    eager = EagerEngine(unet)

    def engine(latents, t, text):
        if wrong == "level ignored":
            return eager(latents, torch.zeros_like(t), text)
        output = eager(latents, t, text)
        if wrong == "nan":
            output[-1, -1, -1, -1] = float("nan")
        return {"scaled": output * 1.05, "rows swapped": output.flip(0)}.get(wrong, output)

    for float32 in (True, False):
        assert not parity.measure(engine, unet, TINY, 4, float32=float32).passed
    with pytest.raises(parity.ParityError, match="broken differs from the eager UNet"):
        parity.gate(engine, unet, TINY, 4, "broken")


# ---- the cache ----------------------------------------------------------------------------------


def test_folder_of_engines(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("DSD_CACHE", str(tmp_path))
    assert cache.folder() == tmp_path
    monkeypatch.delenv("DSD_CACHE")
    assert cache.folder().parts[-3:] == (".cache", "dsd_fast", "engines")


def test_key_covers_all_that_decides_an_engine(tiny_folder) -> None:
    unet = load_model(tiny_folder).unet
    given = {
        "weights": cache.weights_digest(unet),
        "shape": TINY,
        "rows": (4, 8),
        "dtype": torch.float16,
        "library": "tensorrt_rtx",
        "version": "1.7",
        "capability": (8, 9),
    }
    names = [cache.key(**given)]
    assert names[0] == cache.key(**given) and len(names[0]) == 64
    unet.to(memory_format=torch.channels_last)
    assert cache.weights_digest(unet) == given["weights"]
    with torch.no_grad():
        next(unet.parameters())[0, 0, 0, 0] += 1
    changes = {
        "weights": cache.weights_digest(unet),
        "shape": dataclasses.replace(TINY, latents=(4, 8, 16)),
        "rows": (8, 4),
        "dtype": torch.float32,
        "library": "tensorrt",
        "version": "1.8",
        "capability": (12, 0),
    }
    names += [cache.key(**{**given, name: value}) for name, value in changes.items()]
    assert len(set(names)) == len(names)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.engine"
    assert cache.write(path, b"old") == 3

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dsd_fast.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        cache.write(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_engine_is_built_once(tmp_path) -> None:
    path, builds = tmp_path / "deep" / "a.engine", []

    def build():
        builds.append(1)
        return bytearray(b"engine")

    for _ in range(2):
        assert cache.load_or_build(path, lambda p: p.read_bytes(), build) == b"engine"
    assert len(builds) == 1


@pytest.mark.parametrize("refusal", ["none", "exception"])
def test_a_corrupt_file_is_built_again_with_one_line(refusal, tmp_path, caplog) -> None:
    path = tmp_path / "a.engine"
    path.write_bytes(b"half an eng")

    def load(file):
        if file.read_bytes() == b"engine":
            return "loaded"
        if refusal == "exception":
            raise RuntimeError("bad magic")
        return None

    assert cache.load_or_build(path, load, lambda: b"engine") == "loaded"
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and str(path) in warnings[0].getMessage()


def test_a_second_name_takes_no_second_copy(tmp_path, monkeypatch) -> None:
    first, second, third = (tmp_path / name for name in "abc")
    cache.write(first, b"engine")
    second.write_bytes(b"old")
    cache.link(first, second)
    assert second.samefile(first) and second.read_bytes() == b"engine"

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("dsd_fast.diffusion.engines.cache.os.link", refuse)
    cache.link(first, third)
    assert third.read_bytes() == b"engine" and sorted(tmp_path.iterdir()) == [first, second, third]


def test_a_fresh_engine_that_does_not_load_is_an_error(tmp_path) -> None:
    path = tmp_path / "a.engine"
    with pytest.raises(RuntimeError, match="although it was just built"):
        cache.load_or_build(path, lambda file: None, lambda: b"engine")
    assert not path.exists()


# ---- libraries ----------------------------------------------------------------------------------


def test_missing_packages_say_how_to_install_them(only) -> None:
    only()
    with pytest.raises(ImportError, match=r"tensorrt_rtx is not installed: pip install 'dsd_fast"):
        tensorrt_library.find_library()
    with pytest.raises(ImportError, match="tensorrt is not installed: pip install tensorrt"):
        tensorrt_library.find_library("tensorrt")


def test_auto_takes_the_first_library_that_supports_the_gpu(only) -> None:
    only("tensorrt", "tensorrt_rtx")
    assert tensorrt_library.find_library(capability=(8, 9)).name == "tensorrt_rtx"
    assert tensorrt_library.find_library(capability=(9, 0)).name == "tensorrt"
    only("tensorrt_rtx")
    with pytest.raises(tensorrt_library.UnsupportedGPU, match=r"tensorrt_rtx cannot .* 9\.0"):
        tensorrt_library.find_library(capability=(9, 0))


def test_unsupported_gpu_goes_on_with_the_next_engine(only, monkeypatch, tiny_unet, caplog) -> None:
    only("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    cuda = torch.device("cuda")
    assert isinstance(make_engine(tiny_unet, cuda, "tensorrt"), GraphEngine)
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    assert "compute capability 9.0" in caplog.text and "going on without it" in caplog.text
    only()
    with pytest.raises(ImportError, match="pip install"):
        make_engine(tiny_unet, cuda, "tensorrt")


def test_an_engine_that_cannot_be_built_goes_on_with_the_fallback(tiny_unet, monkeypatch, caplog):
    def refuse(*_):
        raise tensorrt_library.BuildError("no such operator")

    monkeypatch.setattr(tensorrt.TensorRTEngine, "_open", refuse)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    library = tensorrt_library.Library("tensorrt_rtx", fake_library())
    engine = tensorrt.TensorRTEngine(tiny_unet, library, EagerEngine(tiny_unet))
    inputs = TINY.sample(4, torch.float32, "cpu")
    for _ in range(2):
        assert torch.equal(engine(*inputs), EagerEngine(tiny_unet)(*inputs))
    assert [r.getMessage() for r in caplog.records] == [
        "going on without tensorrt_rtx: no such operator"
    ]


def test_engine_needs_a_gpu(tiny_unet) -> None:
    with pytest.raises(ValueError, match="tensorrt engine needs a CUDA device, got cpu"):
        make_engine(tiny_unet, torch.device("cpu"), "tensorrt")


def test_other_row_counts_go_to_the_fallback(tiny_unet, caplog) -> None:
    library = tensorrt_library.Library("tensorrt_rtx", fake_library())
    engine = tensorrt.TensorRTEngine(tiny_unet, library, EagerEngine(tiny_unet))
    inputs = TINY.sample(2, torch.float32, "cpu")
    for _ in range(2):
        assert torch.equal(engine(*inputs), EagerEngine(tiny_unet)(*inputs))
    assert [r.getMessage() for r in caplog.records] == [
        "2 rows: not TensorRT, which was built for 4 and 8"
    ]


class FakeContext:
    """Runs a UNet between the addresses it was given, as an execution context does."""

    def __init__(self, unet, factor):
        self.unet, self.factor = unet, factor
        self.shapes, self.addresses = {}, {}

    def set_optimization_profile_async(self, index, stream):
        self.profile = index

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        assert self.profile == {4: 0, 8: 1}[self.shapes["t"][0]]
        latents, t, tokens = (
            self._at(name, self.shapes[name]) for name in ("latents", "t", "tokens")
        )
        inputs = (latents, t, Condition(tokens))
        output = self._at("prediction", self.shapes["latents"])
        output.copy_(EagerEngine(self.unet)(*inputs) * self.factor)
        return True

    def is_stream_capturable(self, stream):
        return self.factor == 1.0

    def _at(self, name, shape):
        dtype = torch.int64 if name == "t" else torch.float32
        size = math.prod(shape) * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return torch.frombuffer(memory, dtype=dtype).view(shape)


@pytest.mark.parametrize("factor, right", [(1.0, True), (1.1, False)])
def test_engine_runs_between_its_buffers(
    factor, right, tiny_unet, tmp_path, monkeypatch, caplog
) -> None:
    monkeypatch.setenv("DSD_CACHE", str(tmp_path))
    stream = SimpleNamespace(cuda_stream=7, wait_stream=lambda s: None, synchronize=lambda: None)
    for name in ("device", "Stream", "current_stream"):
        value = nullcontext() if name == "device" else stream
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    capturing = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    settings = SimpleNamespace()

    def context(given):
        # Kernels for the shapes from the start: what is checked is what will run.
        assert given is settings and given.dynamic_shapes_kernel_specialization_strategy == "eager"
        return FakeContext(tiny_unet, factor)

    plan = SimpleNamespace(create_runtime_config=lambda: settings, create_execution_context=context)
    module = fake_library()
    module.Runtime = lambda _: SimpleNamespace(deserialize_cuda_engine=lambda data: plan)
    monkeypatch.setattr(tensorrt, "export_unet", lambda *_: tmp_path)
    monkeypatch.setattr(tensorrt_library, "build", lambda *_: b"engine")
    monkeypatch.setattr(tensorrt_library.Library, "logger", lambda self: None)
    library = tensorrt_library.Library("tensorrt_rtx", module)
    fallback = Counted(tiny_unet)
    engine = tensorrt.TensorRTEngine(tiny_unet, library, fallback)
    results = []
    for rows in (4, 8, 4):
        inputs = TINY.sample(rows, torch.float32, "cpu", seed=len(results))
        results.append((engine(*inputs), EagerEngine(tiny_unet)(*inputs)))
    # A result belongs to the caller: the third call left the first one as it was.
    assert all(relative_error(got, want) < 1e-6 for got, want in results)
    assert fallback.calls == (0 if right else 3)
    assert ("going on without tensorrt_rtx" in caplog.text) is not right
    assert len(list(tmp_path.glob("*.engine"))) == 1
    if right:
        other = UNetShape((4, 16, 16), (("tokens", (77, 16)),)).sample(4, torch.float32, "cpu")
        with pytest.raises(ValueError, match="the engine was built for"):
            engine(*other)
        capturing.append(True)
        assert engine(*inputs).isfinite().all()
        monkeypatch.setattr(FakeContext, "is_stream_capturable", lambda *_: False)
        with pytest.raises(RuntimeError, match="cannot be a part of a CUDA graph"):
            engine(*inputs)


class Counted(EagerEngine):
    calls = 0

    def __call__(self, *inputs):
        self.calls += 1
        return super().__call__(*inputs)


# ---- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--compute-capability", "ada"], "numbers such as 8.9, got 'ada'"),
        (["--compute-capability", "9.0"], "cannot run on a GPU of compute capability 9.0"),
        (["--compute-capability", "8.9", "--rows", "0"], "rows: expected 1 or more, got (0,)"),
        (["--compute-capability", "8.9", "--model", "/nowhere"], "/nowhere"),
        (["--compute-capability", "8.9", "--library", "tensorrt"], "tensorrt is not installed"),
    ],
)
def test_command_refuses_in_one_line(arguments, words, only, tmp_path, capsys) -> None:
    only("tensorrt_rtx")
    assert build_engine.main([*arguments, "--output", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert words in " ".join(" ".join(lines).split()) and "Traceback" not in " ".join(lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="about computers without a GPU")
def test_command_without_a_gpu_asks_for_which_one(only) -> None:
    only("tensorrt_rtx", "tensorrt")
    with pytest.raises(build_engine.CommandError, match="no GPU is present"):
        build_engine.build_engines(build_engine.BuildCommand())
    command = build_engine.BuildCommand(library="tensorrt", compute_capability=("8.9",))
    with pytest.raises(build_engine.CommandError, match="tensorrt_rtx builds for others"):
        build_engine.build_engines(command)


@pytest.mark.timeout(600)
def test_command_builds_a_tiny_unet(tiny_folder, tmp_path, caplog) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("tensorrt_rtx")
    command = build_engine.BuildCommand(
        model=str(tiny_folder),
        library="tensorrt_rtx",
        compute_capability=("8.9", "12.0"),
        rows=(4,),
        output=tmp_path,
    )
    paths = build_engine.build_engines(command)
    assert sorted(tmp_path.iterdir()) == sorted(paths) and len(set(paths)) == 2
    assert paths[0].stat().st_size > 1000
    # A run, which loads the model in its own way, looks for the same name.
    unet = load_model(tiny_folder).unet.half()
    library = tensorrt_library.find_library("tensorrt_rtx")
    name = tensorrt.engine_key(unet, TINY, (4,), torch.float16, library, (8, 9))
    assert paths[0] == cache.path_of(name, tmp_path)
    # One engine runs on both, and is stored once.
    assert paths[0].samefile(paths[1])
    before = paths[0].stat().st_mtime_ns
    assert build_engine.build_engines(command) == paths
    assert paths[0].stat().st_mtime_ns == before and "is there already" in caplog.text


def test_library_names_what_it_cannot_read(tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx")
    file = tmp_path / "unet.onnx"
    file.write_bytes(b"no network")
    library = tensorrt_library.find_library("tensorrt_rtx")
    with pytest.raises(tensorrt_library.BuildError, match=r"cannot read .*unet\.onnx"):
        tensorrt_library.build(library, file, TINY, (4,), [(8, 9)])


@cuda_only
@pytest.mark.timeout(600)
def test_engine_on_the_gpu(tiny_folder, tmp_path, monkeypatch) -> None:
    capability = torch.cuda.get_device_capability()
    try:
        library = tensorrt_library.find_library("auto", capability)
    except (ImportError, tensorrt_library.UnsupportedGPU) as error:
        pytest.skip(str(error))
    monkeypatch.setenv("DSD_CACHE", str(tmp_path))
    unet = load_model(tiny_folder, "cuda").unet
    eager = EagerEngine(unet)
    engine = tensorrt.TensorRTEngine(unet, library, eager)
    for rows in (4, 8):
        inputs = TINY.sample(rows, torch.float16, "cuda", seed=rows)
        assert relative_error(engine(*inputs), eager(*inputs)) < 2e-2
    assert not engine._disabled and len(list(tmp_path.glob("*.engine"))) == 1


def _inspected(name: str):
    from dsd_fast.diffusion.components import inspect_folder
    from dsd_fast.diffusion.loader import resolve

    return inspect_folder(resolve(name))
