# Tasks of this repository. `make help` lists them; README.md says which two a new user needs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# rustup may have put cargo here only; nft, runc and etcd are for root's PATH.
export PATH := $(HOME)/.cargo/bin:$(PATH):/usr/local/sbin:/usr/sbin:/sbin
TARGET := $(or $(CARGO_TARGET_DIR),target)
# Everything that `make build` makes, side by side: orchctl looks for the other programs here.
OUT := $(TARGET)/orch
LAB_NODES ?= 3
BENCH_ROUNDS ?= 20
FUZZ_CASES ?= 20000

.PHONY: help deps build up down test test-unit test-e2e test-cni test-runtimes test-ha test-provision test-hosts deb dist check bench bench-cni bench-overlay bench-policy bench-footprint docs fuzz install-cni

help: ## list the tasks
	@grep -hE '^[a-z][a-z0-9-]*:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

deps: ## install what is missing, by package name (Debian)
	@scripts/deps

build: deps ## build all programs into target/orch (release mode)
	@scripts/build

up: build ## start the three-node lab with the example and show it answering across nodes
	@$(OUT)/orchctl lab up --nodes $(LAB_NODES)
	@$(OUT)/orchctl lab demo

down: ## end the lab and remove everything it made
	@if [ -x $(OUT)/orchctl ]; then $(OUT)/orchctl lab down; else echo "nothing was built, so there is no lab"; fi

test: build ## all tests: unit, property, store, kernel namespaces, end to end
	@scripts/test all

test-unit: deps ## unit, property and crate tests only
	@scripts/test unit

test-e2e: build ## the user's story in a lab of its own
	@scripts/test e2e

test-cni: build ## the CNI tables alone; CNI_UNDER_TEST=/usr/lib/cni says where other plugins fall short of them
	@[ "$${CNI_UNDER_TEST:-}" != /usr/lib/cni ] || scripts/cni-peers plugins
	ORCH_BIN=$(abspath $(OUT)) cargo test --release --locked --workspace --test conformance

test-runtimes: build ## podman and containerd (ctr, CRI; installed if missing) with our CNI plugins
	@scripts/cni-peers runtimes
	ORCH_BIN=$(abspath $(OUT)) cargo test --release --locked --workspace --test runtimes

test-ha: build ## three control planes die in turn under a writer and clients of a Service, in a lab of its own
	ORCH_BIN=$(abspath $(OUT)) cargo test --release --locked --workspace --test ha

test-provision: build ## orchctl init, join and reset on two hosts made of network namespaces
	@scripts/test-provision $(OUT)

test-hosts: build ## the packages: lintian, vagrant, tarballs; then a cluster of two Debian hosts with systemd (10 minutes)
	@scripts/test-packages $(OUT)
	@scripts/test-hosts $(TARGET)/deb

deb: build ## Debian packages in target/deb: orch, orch-cni
	@scripts/deb $(OUT)

dist: build ## tarballs, checksums and a list of everything linked (SBOM) in target/dist
	@scripts/dist $(OUT)

check: deps ## what must hold for every commit: format, clippy, docs, dependency rules
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	# Private items are documented too, so links to them lead somewhere.
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" cargo doc --release --workspace --no-deps --document-private-items
	cargo test --release -q -p tests-arch
	@if command -v vagrant >/dev/null; then scripts/check-vagrant; else echo "vagrant is not installed: the Vagrantfile is not checked"; fi

bench: build ## ratios against references in the same run, in the lab (started if need be)
	@$(OUT)/orchctl lab up --nodes $(LAB_NODES)
	@$(OUT)/orchctl lab bench --rounds $(BENCH_ROUNDS)

bench-cni: build ## our CNI plugins, the reference ones (installed if missing) and bare netlink, by turns
	@scripts/cni-peers plugins
	@ORCH_BIN=$(abspath $(OUT)) cargo run --release --locked -q --bin bench-cni

bench-overlay: deps ## the overlay against loopback and a VXLAN made by hand, in namespaces of its own (a minute)
	cargo run --release --locked -q --bin overlay-bench

bench-footprint: build ## start-up times, and memory, CPU and writes to etcd of an idle cluster, beside their goals (5 minutes)
	@scripts/bench-footprint $(OUT)

docs: deps ## write docs/reference from the code; `make test` fails when it is stale
	ORCH_WRITE_DOCS=1 cargo test --release --locked --workspace --bin orchctl --bin orchestrator -- the_reference

bench-policy: deps ## NetworkPolicies and Services against none and against nftables, in namespaces of its own (two minutes)
	cargo run --release --locked -q --bin policy-bench

fuzz: deps ## property tests of everything that reads bytes from outside, with many more cases; as root also the eBPF programs
	PROPTEST_CASES=$(FUZZ_CASES) cargo test --release --workspace --lib --test loaded fuzz

install-cni: build ## put the CNI plugins into $(DESTDIR)/opt/cni/bin
	@scripts/install-cni "$(DESTDIR)"
