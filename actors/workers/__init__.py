"""The Ray actors, each with what calls it: rollout, reward, learner, encoder; and the weights between them."""
