"""GPU memory: settings that need less of it exist and change nothing else; the CPU has none."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dsd_fast.config import ConfigError, leaves, preset, set_value
from dsd_fast.run import cli, memory

CPU = torch.device("cpu")


def test_every_setting_exists_and_smaller_gpus_take_on_more() -> None:
    sizes = [size for size, _ in memory.SETTINGS]
    assert sizes == sorted(set(sizes))
    for size, settings in memory.SETTINGS:
        cfg = preset("dsd")
        memory.choose_settings(cfg, size)
        for path, value in settings.items():
            set_value(cfg, path, value)  # raises for what does not exist or has another type
        assert settings.items() <= leaves(cfg).items()
    for (_, smaller), (_, larger) in zip(memory.SETTINGS, memory.SETTINGS[1:]):
        assert larger.items() <= smaller.items()


@pytest.mark.parametrize(("vram", "n_views"), [(6.0, 1), (12.0, 1), (12.1, 4), (24.0, 4)])
def test_settings_follow_the_size(vram, n_views, caplog) -> None:
    caplog.set_level(logging.INFO)
    cfg = preset("dsd")
    cfg.cameras.batch_size = 4
    before = leaves(cfg)
    memory.choose_settings(cfg, vram)
    changed = {path for path, value in leaves(cfg).items() if before[path] != value}
    assert cfg.cameras.batch_size == n_views
    assert changed == ({"cameras.batch_size"} if n_views == 1 else set())
    text = f"--vram {vram:g}: cameras.batch_size = 1 instead of 4"
    assert (text in caplog.text) == (n_views == 1)


def test_the_embedded_model_stays_as_it_is() -> None:
    cfg = preset("embedded")
    memory.choose_settings(cfg, 4.0)
    assert cfg == preset("embedded")


def test_flags_win_over_vram(tmp_path) -> None:
    common = ["--preset", "dsd", "--prompt", "a chair", "--output", str(tmp_path), "--vram", "8"]
    assert cli.parse(common)[0].config.cameras.batch_size == 1
    cfg = cli.parse([*common, "--cameras.batch-size", "2"])[0].config
    assert (cfg.vram, cfg.cameras.batch_size) == (8.0, 2)


def test_a_saved_configuration_is_not_chosen_again(tmp_path) -> None:
    """The settings in it have been chosen, and changed by flags since."""
    path = tmp_path / "config.json"
    path.write_text('{"prompt": "a chair", "preset": "dsd", "vram": 8, "output": "x"}')
    cfg = cli.parse(["--config", str(path)])[0].config
    assert (cfg.vram, cfg.diffusion.engine, cfg.output) == (8.0, "auto", Path("x"))


def test_what_helps_names_flags_that_exist_and_only_what_is_not_so_yet() -> None:
    cfg = preset("dsd")
    cfg.diffusion.dtype, cfg.cameras.batch_size = "float32", (4, 1)
    flags = {
        word.removeprefix("--").replace("-", "_").replace(".no_", ".")
        for way in memory.savings(cfg)
        for word in way.split()
        if word.startswith("--")
    }
    assert flags <= set(leaves(cfg)) and len(flags) == 7
    memory.choose_settings(cfg, 8.0)
    cfg.guidance.use_perp_neg, cfg.diffusion.engine = False, "eager"
    assert [way.split(" (")[0] for way in memory.savings(cfg)] == [
        "smaller --cameras.height and --cameras.width",
        "fewer --renderer.num-samples-per-ray",
    ]


def test_a_cap_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="--vram is for a CUDA GPU"):
        memory.cap(CPU, 8.0)


def test_a_cap_leaves_room_for_cuda(monkeypatch) -> None:
    given = []
    monkeypatch.setattr(memory, "cap_allocations", lambda device, gib: given.append(gib))
    memory.cap(torch.device("cuda", 0), 8.0)
    assert given == [pytest.approx(8.0 - memory.CONTEXT_GIB)]
    with pytest.raises(ConfigError, match=r"CUDA itself takes 0.9; got 0.5"):
        memory.cap(torch.device("cuda", 0), 0.5)


@pytest.mark.parametrize(("name", "index"), [("cuda", 3), ("cuda:1", 1)])
def test_a_cap_is_for_one_gpu(monkeypatch, name, index) -> None:
    given = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=i * 2**34)
    )
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, i: given.append((share, i))
    )
    memory.cap_allocations(torch.device(name), 4.0)
    assert given == [(4.0 / (16 * index), index)]


def test_phases_say_nothing_on_the_cpu(caplog) -> None:
    caplog.set_level(logging.INFO)
    phase = memory.PhaseMemory(CPU)
    phase.begin(True)
    with phase("render"):
        pass
    phase.report(1)
    assert not phase.enabled and not caplog.records
    assert phase.peak_mib() > 0


def test_phases_are_measured_one_by_one(monkeypatch, caplog) -> None:
    """With an allocator that is told what it has: the peak of the whole run is not forgotten."""
    caplog.set_level(logging.INFO)
    peak = {"bytes": 3 << 30}
    cuda = {
        "memory_allocated": lambda device: 1 << 30,
        "max_memory_allocated": lambda device: peak["bytes"],
        "reset_peak_memory_stats": lambda device: peak.update(bytes=1 << 30),
        "mem_get_info": lambda device: (2 << 30, 8 << 30),
    }
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)
    phase = memory.PhaseMemory(torch.device("cuda", 0))
    phase.begin(False)
    with phase("render"):
        pass
    phase.report(1)
    assert not caplog.records and peak["bytes"] == 3 << 30
    phase.begin(True)
    with phase("render"):
        peak["bytes"] = 5 << 29
    with phase("encode"):
        pass
    phase.report(2)
    assert caplog.messages == [
        "memory at step 2, GiB: before 1.00, render 2.50, encode 1.00; "
        "the GPU has 6.00 of 8.00 in use"
    ]
    assert phase.peak_mib() == 3072


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_cap_holds_on_the_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    memory.cap_allocations(device, 0.25)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(1 << 29, dtype=torch.uint8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
