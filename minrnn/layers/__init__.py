"""The layers and cells that stand in for those of `torch.nn`.

drop_ins    MinGRU, MinLSTM: constructor, call and shapes of nn.GRU, nn.LSTM
cells       MinGRUCell, MinLSTMCell: one step, as nn.GRUCell, nn.LSTMCell
stack       what both layers share: weights, layers, directions, states
checks      what they refuse
packed      a PackedSequence as sequences laid end to end
foreign     read_weights: the weights of other public minGRUs and minLSTMs
"""

from minrnn.layers.cells import MinGRUCell as MinGRUCell
from minrnn.layers.cells import MinLSTMCell as MinLSTMCell
from minrnn.layers.drop_ins import MinGRU as MinGRU
from minrnn.layers.drop_ins import MinLSTM as MinLSTM
from minrnn.layers.foreign import read_weights as read_weights
