# From a bare clone: `make edit` edits a picture, `make test` runs the tests. Each first installs what it needs into
# $(VENV); stamp files there make the second call quick.

PYTHON ?= python3
VENV ?= .venv
PIP = "$(VENV)/bin/python" -m pip install --disable-pip-version-check
PYTEST = "$(VENV)/bin/python" -m pytest -n 2 --dist worksteal --durations=20

.PHONY: edit lint test test-slow

edit: $(VENV)/edit.stamp
	@mkdir -p outputs
	"$(VENV)/bin/iedit" edit examples/images/ball-to-cat/source.png "an orange car and a red cat on green grass" \
	    --mask-prompt "red ball" --mask-dilation 2 --model mini --seed 22 -o outputs/edited.png
	@echo "A cat where the ball was: $(CURDIR)/outputs/edited.png"

test: $(VENV)/test.stamp
	$(PYTEST)

test-slow: $(VENV)/test.stamp
	$(PYTEST) -m slow

lint: $(VENV)/test.stamp
	"$(VENV)/bin/ruff" check .
	"$(VENV)/bin/ruff" format --check .
	"$(VENV)/bin/mypy"

$(VENV)/edit.stamp: $(VENV)/torch.stamp pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e .
	touch "$@"

$(VENV)/test.stamp: $(VENV)/torch.stamp pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e ".[test]"
	touch "$@"

$(VENV)/torch.stamp:
	$(PYTHON) -m venv "$(VENV)"
	$(PIP) torch==2.13.0
	touch "$@"
