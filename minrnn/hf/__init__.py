"""Runs as models of transformers: after `import minrnn.hf` its Auto classes open them."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from minrnn.hf.cache import StateCache as StateCache
from minrnn.hf.config import MinRNNConfig as MinRNNConfig
from minrnn.hf.model import MinRNNForCausalLM as MinRNNForCausalLM
from minrnn.hf.model import MinRNNOutput as MinRNNOutput
from minrnn.hf.tokenizer import MinRNNTokenizer as MinRNNTokenizer

AutoConfig.register(MinRNNConfig.model_type, MinRNNConfig)
AutoModelForCausalLM.register(MinRNNConfig, MinRNNForCausalLM)
AutoTokenizer.register(MinRNNConfig, tokenizer_class=MinRNNTokenizer)
