"""Installation of chiar-megatron: what it needs, why, and which versions were tested."""

from glob import glob

from setuptools import find_packages, setup

# Versions are ranges around what the tests ran with. Torch and megatron-core are checked again at run
# time (`chiar_megatron/runtime/env.py`), because clusters often bring their own.
INSTALL_REQUIRES = [
    "torch>=2.11,<2.14",  # tested: 2.13 (CPU, Python 3.11) and 2.11 (CUDA, Python 3.12)
    "megatron-core==0.16.1",  # exact: its signatures move between releases
    "psutil>=5.9,<8",  # megatron-core does not declare it, and without it a checkpoint save hangs
    "numpy>=1.26,<3",  # arrays of token ids, spectra of plans and fits
    "sentencepiece>=0.2,<0.3",  # tokenizers trained by `chiar tokenizer train`
    "jsonargparse>=4.40,<5",  # YAML recipes and overrides onto dataclasses
    "pyyaml>=6,<7",  # the resolved recipe in the run folder
    "rich>=13,<16",  # progress line and tables
    "tqdm>=4.60,<5",  # progress of preprocessing
    "matplotlib>=3.8,<4",  # pictures of runs and scaling laws
    "tokenizers>=0.21,<0.24",  # GPT-2's and Hugging Face's tokenizer files
    "zstandard>=0.22,<1",  # .zst text
]

EXTRAS_REQUIRE = {
    # Python 3.10 is served by transformers 4.x, later ones by 5.x.
    "huggingface": ["transformers>=4.50,<6", "safetensors>=0.4,<1"],
    "scaling": [
        "scipy>=1.11,<2",  # L-BFGS and non-negative least squares of `chiar scaling fit`
        "threadpoolctl>=3.1,<4",  # those on one thread: on a busy machine 30 times faster
        "pyarrow>=15,<27",  # tables of runs in Parquet
    ],
    "deepspeed": ["deepspeed>=0.16,<0.20"],  # conversion needs it not: its tests write and load real files
    "wandb": ["wandb>=0.19,<1"],
    "tensorboard": ["tensorboard>=2.15,<3"],
    # The first host, where `mpirun` spans several outside SLURM. Build it with that MPI (--no-binary mpi4py).
    "mpi4py": ["mpi4py>=4,<5"],
    "dev": [
        "pytest>=8,<10",
        "pytest-timeout>=2.3,<3",
        "pytest-xdist>=3.6,<4",  # tests of one process on all cores
        "ruff>=0.14,<0.18",
        "mypy>=1.15,<3",
        "triton>=3.6,<4; platform_system == 'Linux'",  # its interpreter runs the kernels' tests on a CPU
        "scipy>=1.11,<2",  # an independent DCT to test against
        "types-PyYAML>=6,<7",
    ],
}

setup(
    name="chiar-megatron",
    version="0.1.0",
    description="Pretraining of CHIAR-Former language models on megatron-core",
    python_requires=">=3.10",
    packages=find_packages(include=["chiar_megatron", "chiar_megatron.*"]),
    data_files=[("share/chiar_megatron/slurm", glob("slurm/*.sbatch"))],  # templates of `chiar submit`
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["chiar = chiar_megatron.cli:main"]},
)
