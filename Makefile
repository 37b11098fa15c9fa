# make demo | make test | make lint: each sets itself up first (.venv); a second call installs nothing.
# ARGS goes to the tool: make test ARGS="-k lstm", make demo ARGS="--workdir=elsewhere".

ARGS ?=
STAMP := .venv/.installed
RUN := .venv/bin/python -m

.PHONY: demo test lint

demo: $(STAMP)
	@$(RUN) experiments.demo $(ARGS)

test: $(STAMP)
	@$(RUN) pytest -n 2 --dist worksteal $(ARGS)

lint: $(STAMP)
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .

# The version nearest to the checked one (3.11) that runs and can make an environment; a name on the PATH may be a dead shim.
$(STAMP): requirements.txt pyproject.toml
	@for python in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "make: no Python 3.11 or newer with the venv module on the PATH: install python3.11 (Debian: python3.11-venv) and run make again" >&2; exit 1; \
	fi; \
	echo "Setting up .venv with $$($$found --version) (once; some minutes, depending on the network)"; \
	$$found -m venv .venv && $(RUN) pip install --quiet --disable-pip-version-check -e '.[dev]' && touch $@
