# `make demo`, `make test` and `make lint` each set up what they need in .venv first; a second run finds it there.
# PYTHON=... chooses the interpreter (3.11 or later) the environment is made with.

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO_PROMPTS := "a red circle moving right on a black background" "a blue square moving down" "a shape"

.PHONY: demo test lint format workflows screenshots thumbnails mistakes locales bench-gpu clean

demo: .venv/installed
	$(BIN)/accvideo compare $(DEMO_PROMPTS) --out out/demo

# One pytest run over everything; tests whose ComfyUI or other counterpart is not here are listed with the reason.
test: lint
	@found="$$($(BIN)/python tests/comfyui/setup_envs.py)" && echo "$$found" && \
	$(BIN)/python -m pytest && \
	echo "make test: lint, types and tests passed. ComfyUI: $$(echo "$$found" | cut -d: -f1 | paste -sd, -)"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation's pictures of ComfyUI's page, made by the browser tests in ~/comfy/ComfyUI; needs Chromium.
screenshots: .venv/installed-dev
	ACCVIDEO_SCREENSHOTS=out/screenshots $(BIN)/python -m pytest tests/comfyui/test_browser.py
	install -m 644 out/screenshots/ComfyUI/slider.png docs/images
	install -m 644 out/screenshots/ComfyUI/nodes/*.png web/docs/img

# workflows/*.json and workflows/api/*.json from their descriptions in tests/comfyui/workflow_list.py.
workflows: .venv/installed-dev
	$(BIN)/python -m tests.comfyui.workflow_list

# Pictures of workflows/*.json from real runs in the first ComfyUI found; needs the bundled weights.
thumbnails: .venv/installed-dev
	$(BIN)/python -m tests.comfyui.thumbnails

# docs/mistakes.md: makes every mistake of tests/comfyui/mistakes.py in each ComfyUI found.
mistakes: .venv/installed-dev
	$(BIN)/python -m tests.comfyui.mistakes

# locales/en from the nodes' own texts, in the first ComfyUI found.
locales: .venv/installed-dev
	$(BIN)/python -m tests.comfyui.locales

# Everything that wants a GPU, within nine minutes, into out/bench-gpu; --device cpu tries it out in small sizes.
bench-gpu: .venv/installed-dev
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf .venv out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing AccVideo into .venv (PyTorch is large: minutes the first time)"
	$(PIP) -e .
	@touch $@

.venv/installed-dev: .venv/installed pyproject.toml constraints.txt
	@echo "installing the development tools into .venv"
	$(PIP) -e ".[dev]"
	@touch $@

.venv/bin/python:
	@for python in $(PYTHON) python3.11 python3 python3.12 python3.13; do \
		if $$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "making .venv with $$($$python --version)"; exec $$python -m venv .venv; \
		fi; \
	done; \
	echo "Python 3.11 or later with venv is needed (Debian and Ubuntu: apt-get install python3 python3-venv), or name one: make PYTHON=..." >&2; exit 1
