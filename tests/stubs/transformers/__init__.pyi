# The names of transformers that clt/ imports, for pyright; a new one is added here. The package's own __init__ leads to
# 2,600 files, which took a third of pyright's time, and so do the classes that are Any here.
from typing import Any

from transformers.configuration_utils import PretrainedConfig as PretrainedConfig
from transformers.modeling_utils import PreTrainedModel as PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase as PreTrainedTokenizerBase

AutoConfig: Any
AutoModelForCausalLM: Any
AutoTokenizer: Any
GPT2Config: Any
GPT2LMHeadModel: Any
