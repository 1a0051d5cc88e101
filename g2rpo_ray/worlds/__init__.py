"""The embedded worlds of drawn pictures: their assets, how they are drawn, and rules that judge pictures of them."""
