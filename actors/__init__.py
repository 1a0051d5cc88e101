"""Ray actors: thin shells that construct, delegate, return; and the pools that supervise them."""
