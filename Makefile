# SPDX-License-Identifier: Apache-2.0
# Every target sets itself up in a virtual environment, .venv, from PYTHON with the compiler CC.

PYTHON ?= python3
# Without a choice of ours: gcc, else clang, whatever compiler that Python itself was built with.
ifeq ($(origin CC),default)
CC := $(firstword $(foreach name,gcc clang cc,$(if $(shell command -v $(name)),$(name))) gcc)
endif

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE := $(shell find spanker/kernels/csrc spanker/device/csrc spanker/ggml/csrc driver/include -name '*.[ch]')
CHECK_OUT := build/check
SERVER := build/spanker-card-server
FIRMWARE := build/spanker-firmware.elf

# Processes that run tests side by side, each whole files.
TEST_JOBS ?= 2

DEMO_CARDS ?= 3
DEMO_PROMPT ?= What is the capital of France, and what is it known for?

.PHONY: help build card-server firmware demo test test-long soak test-riscv test-driver test-driver-debug
.PHONY: check check-python check-c check-sanitize bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@echo "make <target> [PYTHON=python3.12] [CC=clang]"
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 18

build: $(INSTALLED)  ## set up .venv and compile the native part

demo: $(INSTALLED)  ## fetch a model and let it answer on three emulated cards
	$(BIN)/spanker pull smollm2
	$(BIN)/spanker run "$(DEMO_PROMPT)" --chat --model smollm2 --cards $(DEMO_CARDS) --max-tokens 96

test: $(INSTALLED)  ## run the tests (PYTEST_ARGS=... adds options)
	$(BIN)/python -m pytest --durations=10 --numprocesses=$(TEST_JOBS) --dist=loadfile $(PYTEST_ARGS)

test-long: $(INSTALLED)  ## run the tests that take minutes
	$(BIN)/python -m pytest --durations=10 -m long $(PYTEST_ARGS)

soak: $(INSTALLED)  ## ten thousand fleets that things happen to, and more for long (SOAK_ARGS="--seeds 0:100")
	$(BIN)/python -m spanker.testing.misfortune --seeds 0:10000 $(SOAK_ARGS)
	$(BIN)/python -m pytest --durations=10 -s -m soak tests/testing/test_misfortune_soak.py

test-riscv: $(INSTALLED)  ## run the RISC-V code in QEMU (installs what that needs where root, Debian 12)
	PYTHON="$(BIN)/python" tools/test_riscv.sh --durations=10 --numprocesses=$(TEST_JOBS) --dist=worksteal $(PYTEST_ARGS)

test-driver: $(INSTALLED)  ## run the kernel module and a model in virtual machines (Debian 12, root)
	$(BIN)/python driver/tests/vm/run.py $(DRIVER_ARGS)

test-driver-debug: $(INSTALLED)  ## its C programs on a kernel that looks for bugs (10 minutes to build)
	$(BIN)/python driver/tests/vm/run.py --debug $(DRIVER_ARGS)

check: check-python check-c check-sanitize  ## run all checks of the code itself

check-python: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-c: $(INSTALLED)  ## C warnings (clang too), no fused multiply-add, AVX-512 and NEON emulated
	$(BIN)/python tools/check_native.py warnings --cc "$(CC)"
	$(BIN)/python tools/lint_fma.py $(CHECK_OUT)/$(notdir $(firstword $(CC)))
	@if [ "$(CC)" != clang ] && command -v clang >/dev/null; then \
	  set -e -x; \
	  $(BIN)/python tools/check_native.py warnings --cc clang; \
	  $(BIN)/python tools/lint_fma.py $(CHECK_OUT)/clang; \
	fi
	CC="$(CC)" tools/check_avx512.sh
	CC="$(CC)" PYTHON="$(BIN)/python" tools/check_neon.sh

check-sanitize: $(INSTALLED)  ## native tests under address, undefined-behaviour and thread sanitizers
	$(BIN)/python tools/check_native.py sanitize --cc "$(CC)"

bench: $(INSTALLED)  ## measure beside the machine's limits, and llama.cpp (BENCH_ARGS=... adds options)
	$(BIN)/python bench/roofline.py $(BENCH_ARGS)

card-server: $(SERVER)  ## build spanker-card-server: emulated cards on QEMU's PCI bus

$(SERVER): $(INSTALLED) $(NATIVE) $(wildcard spanker/device/server/*.[ch] driver/include/*.h) tools/build_card_server.py
	$(BIN)/python tools/build_card_server.py --cc "$(CC)" $@

firmware: $(FIRMWARE)  ## build the firmware of RISC-V cards (clang, and the C library for riscv64)

$(FIRMWARE): $(INSTALLED) $(NATIVE) $(wildcard spanker/device/card_process/*.[ch] spanker/device/riscv/csrc/*.[ch]) tools/build_firmware.py
	$(BIN)/python tools/build_firmware.py $@

clean:  ## remove everything that was built, .venv too
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f spanker/_native*.so
	find . -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml setup.py spanker/native_build.py spanker/_version.py $(NATIVE)
	@$(PYTHON) tools/check_setup.py "$(CC)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Building into $(VENV); the first time takes a minute or two."
	CC="$(CC)" $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
