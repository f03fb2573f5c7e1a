"""The one thread with the event loop: rollout and training coroutines and everything beside them."""
