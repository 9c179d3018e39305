"""What a user sees of a run: meters, `metrics.jsonl`, TensorBoard, wandb, the progress line, the picture.

One record of `metrics.jsonl` is one logged step. The training loop fills these keys:

| key | value |
|---|---|
| step | optimizer steps done, 1 after the first |
| loss | mean over the tokens of the global batch, nats per token |
| z_loss | the extra term of the objective, nats per token; only where it is on |
| grad_norm | global gradient norm before clipping |
| learning_rate | of this step |
| tokens_per_second, step_seconds | over all devices, since the last record, pauses excluded |
| tokens_seen | training tokens since step 0 |
| routed_fraction | list: share of tokens sent to attention, one entry per R layer |
| overflow_fraction | list: share of light tokens that found no row, one entry per R layer |
| entropy_mean | list: mean spectral entropy, one entry per R layer |
| gate | MetaRouter's g; null without a MetaRouter |
| mfu | share of the vendor's dense bf16 peak, in [0, 1]; GPU only |
| bad_steps | steps skipped so far because of a non-finite loss or gradient |
| validation | `{name: loss}` in nats per token, on the steps that validate |
"""
