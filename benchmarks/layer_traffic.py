"""How many MiB a process sends within one layer of the 400M model, forward and backward, by layout.

From the ledger (`chiar_megatron/model/traffic.py`), which tests compare with the collectives' own tensors: no
GPU and no time is measured. Prints the table of README.md.
"""

from __future__ import annotations

from dataclasses import replace

from chiar_megatron.config.load import resolve_config
from chiar_megatron.config.schema import ModelConfig, ParallelConfig, RouterConfig, RunConfig
from chiar_megatron.model.traffic import traffic_per_micro_batch

MIB, MICRO_BATCH = 2**20, 8
MODEL = ModelConfig(
    schedule="D R A", hidden_size=1024, num_attention_heads=16, seq_length=2048, vocab_size=50304
)
LAYOUTS = {
    "TP=4": ParallelConfig(tensor_model_parallel_size=4),
    "TP=4+SP": ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True),
    "CP=4": ParallelConfig(context_parallel_size=4),
    "TP=2+SP CP=2": ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2
    ),
}


def main() -> None:
    """Columns: D, A, then R with keys of all and of light tokens at ρ = 1/2, 1/4, 1/8."""
    for name, parallel in LAYOUTS.items():
        cells = []
        for keys in ("all", "routed"):
            for target in (0.5, 0.25, 0.125):
                model = replace(MODEL, router=RouterConfig(target=target, keys_values=keys))
                config = resolve_config(RunConfig(model=model), vocab_size=None, eod_token=0)
                ledger = traffic_per_micro_batch(config.model, parallel, MICRO_BATCH)
                if not cells:
                    cells += [sum(ledger.total(1)), sum(ledger.total(3))]
                cells.append(sum(ledger.total(2)))
        print(f"| {name} | " + " | ".join(f"{cell / MIB:.0f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
