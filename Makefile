# `make demo` and `make test` set everything up by themselves, in .venv; nothing outside this folder is changed.
PYTHON := .venv/bin/python
STAMP := .venv/.setup-done

.PHONY: setup demo notebooks docs test test-slow lint clean

setup: $(STAMP)

# The first interpreter that is new enough; otherwise say which one was found.
$(STAMP): requirements.lock pyproject.toml
	@found=; seen=; \
	for python in python3.14 python3.13 python3.12 python3; do \
	  version="$$($$python --version 2>/dev/null)" || continue; \
	  seen="$$version"; \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "error: Python 3.12 or newer is needed; found $${seen:-none}" >&2; exit 1; \
	fi; \
	if ! $(PYTHON) -c 'import pip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
	  [ ! -e .venv ] || echo ".venv is half made or of a Python older than 3.12: it is made anew"; \
	  echo "making .venv with $$seen"; \
	  $$found -m venv --clear .venv; \
	fi
	@echo "installing the versions of requirements.lock into .venv; where they must be downloaded this takes minutes"
	$(PYTHON) -m pip install --disable-pip-version-check -r requirements.lock
	$(PYTHON) -m pip install --disable-pip-version-check --quiet --no-deps -e .
	@touch $@

demo: setup
	$(PYTHON) -m dsv32_jax.experiments.demo

# Runs experiments/notebooks/*.py and writes the .ipynb beside each.
notebooks: setup
	$(PYTHON) -m dsv32_jax.experiments.notebooks

test: setup
	$(PYTHON) -m pytest -n 2

test-slow: setup
	$(PYTHON) -m pytest -n 2 -m "slow or not slow"

# The site of docs/, into build/site.
docs: setup
	$(PYTHON) -m mkdocs build --strict

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	@# mypy knows no other name for a folder, so it sees the packages through links that have their imported names.
	@rm -rf build/mypy; mkdir -p build/mypy/dsv32_jax
	@ln -s $(CURDIR)/dsv32_jax/* $(CURDIR)/convert $(CURDIR)/experiments build/mypy/dsv32_jax/
	@ln -s $(CURDIR)/pallas_kernels build/mypy/
	cd build/mypy && $(CURDIR)/$(PYTHON) -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
