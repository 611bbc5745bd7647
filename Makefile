# `make demo` and `make test` do everything, set-up included, on a machine with Python 3.10+ and a C++ compiler. The demo
# installs and builds only what it needs itself, any other target the rest.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Python compiles a module when it is first imported; compiling all of torch's doubles the time of its installation.
INSTALL := .venv/bin/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt
# An editable install: only native sources, and what steers the installation, make it stale.
NATIVE := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.NOTPARALLEL:  # one environment

.PHONY: help demo test test-long drill bench gpu lint format build resources report clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

demo: .venv/demo  ## train every width on small images, time every width of ViT-B, draw both; ARGS="--epochs 5"
	HYDRAVIT_BUILD=cpu hydravit demo --out runs/demo $(ARGS)

# Tests are small: a process per core, of one thread, is faster than one process with a thread per core.
PYTEST := OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 8 --dist worksteal
# Triton's interpreter replaces its compiler in a whole process: what runs on it has processes of its own.
INTERPRETED := TRITON_INTERPRET=1 $(PYTEST) tests/kernels/test_triton.py tests/kernels/test_adamw_kernel.py

test: build  ## the test suite, without the long tests
	$(PYTEST) -m "not long"
	$(INTERPRETED) -m "not long"

test-long: build  ## the long tests
	$(PYTEST) -m long
	$(INTERPRETED) -m long

drill: build  ## trainings are killed, starved of disk space, signalled and damaged, and must go on; ARGS="kills"
	python tests/drill.py $(ARGS)

bench: build  ## every width beside the best other tools; ARGS="--heads 3-12", see `hydravit benchmark --help`
	hydravit benchmark $(ARGS)

# No environment of its own: such a machine has what is needed, and nothing can be downloaded there.
gpu:  ## everything that needs a GPU, against a deadline; PARTS=build,tests MINUTES=8 OUT=FOLDER
	$(PYTHON) -u -m bench.gpu $(if $(PARTS),--parts $(PARTS)) $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(OUT),--out $(OUT)) $(ARGS)

lint: build  ## style of Python and C++, and types
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run --Werror $(CXX_FILES)

format: build  ## put Python and C++ in that style
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_FILES)

build: .venv/test  ## the whole environment and the native library, incrementally

resources:  ## registers and spills of every CUDA kernel, to csrc/cuda/resources.csv; needs nvcc, no GPU
	$(PYTHON) -m bench.gpu.resources

report: build  ## what was built, what runs on this machine, and why the rest does not
	python -m hydravit_kernels

clean:  ## remove what `make` made: environment, builds, caches
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache hydravit_kernels/_C.so hydravit_kernels/_cuda.so hydravit_kernels/_build_info.py
	find hydravit hydravit_kernels tests bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

CXX_FILES = $(shell find bench csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# torch comes first: setup.py builds against it and must not bring one of its own.
.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch "setuptools>=70.1" "cmake>=3.25" ninja
	touch $@

.venv/demo: .venv/torch $(NATIVE)
	HYDRAVIT_BUILD=cpu HYDRAVIT_CPU_ISAS=native $(INSTALL) --no-build-isolation -e '.[demo]'
	touch $@

# Has all that the demo needs, which then has nothing to do.
.venv/test: .venv/torch $(NATIVE)
	$(INSTALL) --no-build-isolation -e '.[test]'
	.venv/bin/python -m hydravit.torchvision_operators  # lets timm be imported beside a torch for CPUs
	touch .venv/demo $@
