# The names that clt/ imports. The own __init__ of transformers leads to 2,600 files, as does what the methods of these
# classes return, which is not annotated: pyright would read them for a third of its time.
from typing import Any

from transformers.configuration_utils import PretrainedConfig as PretrainedConfig
from transformers.modeling_utils import PreTrainedModel as PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase as PreTrainedTokenizerBase

AutoConfig: Any
AutoModelForCausalLM: Any
AutoTokenizer: Any
GPT2Config: Any
GPT2LMHeadModel: Any
