"""What mixes information over time inside a block, behind the one contract.

    forward(x, state) -> (y, state)     x and y (B, T, width), T >= 1; state a State or None
    init_state(batch_size) -> State     the state before the first step

minimal      MinGRU, MinLSTM, widened and projected back
recurrent    nn.GRU, nn.LSTM likewise
attention    causal attention; its state grows
mamba        the Mamba block, and S6 inside it
s4d          S4D, linear and time-invariant
hyena        a long convolution; its state grows
h3           gates around one of the last three
aaren        attention with a query that does not depend on the input

S6, S4D and LongConvolution are inner layers: they have no gates of their own, and stand in `Mamba`,
in `H3`, or `Ungated`.
"""

from minrnn.mixers.aaren import Aaren as Aaren
from minrnn.mixers.attention import Attention as Attention
from minrnn.mixers.contract import Mixer as Mixer
from minrnn.mixers.h3 import H3 as H3
from minrnn.mixers.h3 import Ungated as Ungated
from minrnn.mixers.hyena import LongConvolution as LongConvolution
from minrnn.mixers.mamba import S6 as S6
from minrnn.mixers.mamba import Mamba as Mamba
from minrnn.mixers.minimal import MinimalRNN as MinimalRNN
from minrnn.mixers.none import NoMixer as NoMixer
from minrnn.mixers.recurrent import RecurrentNetwork as RecurrentNetwork
from minrnn.mixers.s4d import S4D as S4D
