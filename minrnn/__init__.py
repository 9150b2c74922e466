"""GRUs and LSTMs that train in parallel and stream in constant memory: the table of contents."""

# first: see there
from minrnn import startup as startup
from minrnn.checkpoint import Checkpoint as Checkpoint
from minrnn.checkpoint import load as load
from minrnn.checkpoint import save as save
from minrnn.data.batch import Batch as Batch
from minrnn.data.tokenizers import Bytes as Bytes
from minrnn.data.tokenizers import Characters as Characters
from minrnn.layers import MinGRU as MinGRU
from minrnn.layers import MinGRUCell as MinGRUCell
from minrnn.layers import MinLSTM as MinLSTM
from minrnn.layers import MinLSTMCell as MinLSTMCell
from minrnn.models import LanguageModel as LanguageModel
from minrnn.models import ModelConfig as ModelConfig
from minrnn.ops import mingru as mingru
from minrnn.ops import minlstm as minlstm
from minrnn.ops import scan as scan
from minrnn.sampling import Sampling as Sampling
from minrnn.state import State as State
from minrnn.stream import Stream as Stream
from minrnn.stream import generate as generate

__version__ = "0.1.0"
