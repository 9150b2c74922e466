"""Runs as models of transformers: after `import minrnn.hf` its Auto classes open them."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from minrnn.hf.cache import StateCache as StateCache
from minrnn.hf.config import MinRNNConfig as MinRNNConfig
from minrnn.hf.model import MinRNNForCausalLM as MinRNNForCausalLM
from minrnn.hf.model import MinRNNOutput as MinRNNOutput
from minrnn.hf.tokenizer import MinRNNTokenizer as MinRNNTokenizer

AutoConfig.register(MinRNNConfig.model_type, MinRNNConfig)
AutoModelForCausalLM.register(MinRNNConfig, MinRNNForCausalLM)
AutoTokenizer.register(MinRNNConfig, tokenizer_class=MinRNNTokenizer)
# by this table of names `Trainer` knows that labels must be shifted before it smooths them
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MinRNNConfig.model_type] = MinRNNForCausalLM.__name__
