"""Handles with the four verbs, supervised replicas, batched calls and failure budgets. No Ray.

The path of `await services.trainer.train_step.call(batch)`:

    the driver's process
      ActorHandle.__getattr__  services/handle.py      makes `.train_step` a BoundMethod
      BoundMethod.call         services/handle.py      notes that this task waits for "trainer.train_step"
      Service.call_replica     services/service.py     waits for a healthy replica; repeats the call after a death
      Replica.attempt          services/replica.py     counts the call; reports a death to the replica's supervisor
      Process.call             services/endpoint.py    one process; `Gang.call`: every rank, one call after the other
      RayEndpoint.invoke       cluster/actor.py        hoists object references to where Ray resolves them
        (LocalEndpoint.invoke  services/local.py       the same without Ray: a task of this process)
    ------------------------------------------------- Ray
    the actor's process
      _Host.invoke             cluster/actor.py        puts the referenced values back into the arguments
      Trainer.train_step       actors/trainer.py       the actor: a plain class
      ComputeThread.run        utils/torch_utils.py    keeps the actor's event loop free
      Learner.train_step       learner/learner.py      the optimizer step

The result comes back as a list with one item per rank. An exception in the actor is raised at the `await`, with its
type. `route` chooses the replica by `Service.available`; `fanout` goes to all healthy replicas by `Service.fanout`.
"""
