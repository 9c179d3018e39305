"""CHIAR-Former in Hugging Face's `transformers`: importing this package registers it with the Auto classes.

import chiar_megatron.huggingface
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("folder of chiar convert --to huggingface")
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from chiar_megatron.huggingface.configuration import ChiarConfig
from chiar_megatron.huggingface.modeling import ChiarForCausalLM, ChiarModel
from chiar_megatron.huggingface.routers import Routing

__all__ = ["ChiarConfig", "ChiarForCausalLM", "ChiarModel", "Routing"]

AutoConfig.register("chiar", ChiarConfig, exist_ok=True)
AutoModel.register(ChiarConfig, ChiarModel, exist_ok=True)
AutoModelForCausalLM.register(ChiarConfig, ChiarForCausalLM, exist_ok=True)
