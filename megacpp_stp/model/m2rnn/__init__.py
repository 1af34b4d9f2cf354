"""The R block: M2RNN, a recurrent layer with a matrix for a state and a tanh in its transition."""
