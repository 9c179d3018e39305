"""What a user sees of a run: meters, `metrics.jsonl`, TensorBoard, wandb, the progress line, the picture.

One record of `metrics.jsonl` is one logged step. The training loop fills these keys:

| key | value |
|---|---|
| step | optimizer steps done, 1 after the first |
| loss | mean over the tokens of the global batch, nats per token |
| z_loss | the extra term of the objective, nats per token; only where it is on |
| grad_norm | global gradient norm before clipping |
| learning_rate | of this step |
| tokens_per_second, step_seconds | over all devices, from the end of the last record's step to the end of
  this one, pauses excluded. On CUDA steps end as the device tells |
| tokens_seen | training tokens since step 0 |
| gate | MetaRouter's g; null without a MetaRouter |
| mfu | share of the vendor's dense bf16 peak, in [0, 1]; GPU only |
| bad_steps | steps skipped so far because of a non-finite loss or gradient |
| alarms | `{"imbalance/layer_3": 1.31}`: what is out of order now (`alarms.py`) |
| validation | `{name: loss}` in nats per token, on the steps that validate |
| rank_seconds | `{mean, max, max_over_mean, slowest_rank}` over all ranks of their own forward and
  backward work. CUDA: device time, one or two steps old. CPU: processor time |
| all_layers_executed_max_over_mean | rows that attention executed in all layers, largest over mean of the
  data-parallel ranks |

Lists, one entry per R layer, of this step:

| key | value |
|---|---|
| routed_fraction | share of tokens that the router sends to attention, before capacity |
| useful_over_executed | rows with a light token over rows that attention executed |
| overflow_fraction | share of light tokens that found no row |
| rank_max_over_mean | light tokens before capacity, largest over mean of the data-parallel ranks |
| micro_batch_max_over_mean | the same over the single micro-batches of all data-parallel ranks |
| executed_max_over_mean | rows that attention executed, largest over mean of the data-parallel ranks |
| threshold | that decided this step's tokens; not for `soft` and `hard` |
| score_mean, score_std | of what is compared with the threshold |
| entropy_mean | mean spectral entropy; 0 where the router computes none |
| score_histogram | 18 counts: scores below -4, from -4 to 4 in halves, from 4 on, in standard deviations
  around the mean, both of the step before; of every rank's last micro-batch. Not of an attempt's first |
"""
