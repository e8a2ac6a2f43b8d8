"""The mathematics of softk, once, in plain operations of the Python Array API standard."""
