# make demo        kimi-tiny, the small trained model in this repository, answers four questions
# make test        the test suite on transformers 4.57 (.venv)
# make test-next   the same on transformers 5.x (.venv-next)
# make test-kernels  the Triton kernels, interpreted and compiled for four GPUs (.venv-kernels); on a GPU: pytest -m "gpu or kernels"
# make test-engines  kimi-tiny in other engines: transformers' own class, MLX, llama.cpp (builds it; .venv-engines)
# make serve       the endpoint for MODEL=folder on this machine (ARGS for more, see python -m serve --help)
# make lint        formatting, lint and types
# Needs Python 3.10 or later and make; each target makes the environment it runs in.

PYTHON ?= python3

.PHONY: demo test test-next test-kernels test-engines lint serve

demo: .venv/ready
	.venv/bin/python -m scripts.demo

test: .venv/ready-dev
	.venv/bin/python -m pytest $(ARGS)

test-next: .venv-next/ready-dev
	.venv-next/bin/python -m pytest $(ARGS)

test-kernels: .venv-kernels/ready
	.venv-kernels/bin/python -m pytest -m kernels $(ARGS)

test-engines: .venv-engines/ready
	.venv-engines/bin/python -m pytest -m engines tests/engines $(ARGS)

MODEL ?= kimi-tiny

serve: .venv/ready-serve
	.venv/bin/python -m serve --model $(MODEL) $(ARGS)

lint: .venv/ready-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	mkdir -p .types && ln -sfn .. .types/kimi
	.venv/bin/mypy

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv/ready-serve: requirements-serve.txt .venv/ready
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-serve.txt
	touch $@

# requirements-dev.txt includes requirements-serve.txt.
.venv/ready-dev .venv-next/ready-dev .venv-kernels/ready: requirements-serve.txt

.venv-next/ready-dev: requirements-next.txt requirements-dev.txt
	$(PYTHON) -m venv .venv-next
	.venv-next/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-next.txt -r requirements-dev.txt
	touch $@

.venv-kernels/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv-kernels
	.venv-kernels/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt triton==3.6.0
	# The interpreter of triton 3.6 needs an older numpy than the one pinned.
	.venv-kernels/bin/python -m pip install --quiet --disable-pip-version-check "numpy==2.3.5; python_version >= '3.11'"
	touch $@

# One source package has both the library and the converter.
LLAMA_CPP = llama_cpp_python-0.3.36
.venv-engines/ready: requirements-engines.txt
	$(PYTHON) -m venv .venv-engines
	.venv-engines/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-engines.txt
	.venv-engines/bin/python -m pip download --quiet --no-deps --no-binary :all: -d .venv-engines llama-cpp-python==0.3.36
	.venv-engines/bin/python -m pip install --quiet --disable-pip-version-check .venv-engines/$(LLAMA_CPP).tar.gz
	tar -xzf .venv-engines/$(LLAMA_CPP).tar.gz -C .venv-engines
	ln -sfn $(LLAMA_CPP)/vendor/llama.cpp .venv-engines/llama.cpp
	touch $@
