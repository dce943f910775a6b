# SPDX-License-Identifier: Apache-2.0
"""`spanker info` on the kernel module and its cards, and `spanker firmware check`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_process import batch
from driver_model import SERIAL_0, DriverModel
from elf_images import Image

from spanker.cli.info import info
from spanker.device import uapi


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[DriverModel]:
    """The kernel module's model, with two cards, instead of this machine's kernel."""
    model = DriverModel(2, 32 << 20)
    monkeypatch.setattr(uapi, "LINUX", model)
    yield model
    assert model.open_files == 0
    model.shut_down()


def test_info_lists_the_module_and_its_cards(
    module: DriverModel, capsys: pytest.CaptureFixture[str]
) -> None:
    module.cards[1].failed = True
    info(None, as_json=True)
    driver = json.loads(capsys.readouterr().out)["driver"]
    assert (driver["loaded"], driver["version"], driver["problems"]) == (True, "0.2.0", [])
    first, second = driver["cards"]
    assert first["serial"] == f"{SERIAL_0:016x}" and first["sku"] == "POPC_16A"
    assert first["ddr_bytes"] == first["ddr_free"] == 32 << 20
    assert (first["links_up"], first["generation"], first["failed"]) == (1, 0, False)
    assert second["failed"]
    info(None, as_json=False)
    out = capsys.readouterr().out
    assert "interface 0.2.0 (this Spanker 0.2.0), 2 cards" in out
    row = next(line for line in out.splitlines() if f"{SERIAL_0:016x}" in line)
    assert "POPC_16A" in row and "32 MiB" in row and "1 of 1 up" in row and "emulated" in row


def test_info_says_that_the_module_is_not_loaded(
    module: DriverModel, capsys: pytest.CaptureFixture[str]
) -> None:
    module.loaded = False
    info(None, as_json=False)
    assert "module not loaded" in capsys.readouterr().out
    info(None, as_json=True)
    assert json.loads(capsys.readouterr().out)["driver"]["loaded"] is False


def test_info_names_cards_that_it_may_not_open(
    module: DriverModel, capsys: pytest.CaptureFixture[str]
) -> None:
    module.denied.add("/dev/spanker1")
    info(None, as_json=False)
    told = capsys.readouterr()
    assert "1 card" in told.out and "/dev/spanker1" in told.err
    module.denied.add("/dev/spankerctl")
    info(None, as_json=False)
    assert "/dev/spankerctl" in capsys.readouterr().out


def test_info_says_what_riscv_cards_need(
    module: DriverModel,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    emulator, image = tmp_path / "qemu-riscv64", tmp_path / "image.elf"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SPANKER_FIRMWARE", str(image))

    def told() -> tuple[str, dict[str, str | None]]:
        info(None, as_json=False)
        shown = capsys.readouterr().out
        info(None, as_json=True)
        return shown, json.loads(capsys.readouterr().out)["riscv"]

    shown, found = told()
    assert "package qemu-user" in " ".join(shown.split()) and found["emulator"] is None
    emulator.touch(0o755)
    shown, found = told()
    assert "there is no such file" in " ".join(shown.split())
    assert (found["emulator"], found["firmware"]) == (str(emulator), None)
    image.write_bytes(Image().build())
    shown, found = told()
    assert str(image) in shown and str(emulator) in shown and "rv64gcv" in shown
    assert (found["firmware"], found["problem"]) == (str(image), None)
    image.write_bytes(Image(abi=(9, 0)).build())
    shown, found = told()
    assert "made for version 9.0" in shown and found["isa"] is None


def test_firmware_is_checked(tmp_path: Path) -> None:
    good, bad = str(tmp_path / "good.elf"), str(tmp_path / "bad.elf")
    Path(good).write_bytes(Image().build())
    Path(bad).write_bytes(Image(machine=62).build())
    shown, as_json, refused, missing, kernel = batch(
        ("firmware", "check", good),
        ("firmware", "check", good, "--json"),
        ("firmware", "check", bad),
        ("firmware", "check", str(tmp_path / "none.elf")),
        ("run", "hello", "--cards", "kernel:1,soft:1"),
    )
    assert shown.code == 0 and "rv64gcv_zvl128b_xpopmatmul" in shown.out
    assert "matmul_q4_0" in shown.out
    assert as_json.json()["kernels"][1] == {"op": "add", "format": 0, "symbol": "add_f32"}
    for done, words in (
        (refused, "machine is EM_X86_64, a card takes EM_RISCV"),
        (missing, "No such file"),
        (kernel, "kernel and soft cards do not go together"),
    ):
        assert done.code == 1 and words in done.err and "Traceback" not in done.err
