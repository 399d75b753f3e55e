"""Runs a rank's list of pipeline actions on the host: what is kept of a micro-batch, and what goes to the next stage and comes from it.

A stage keeps, of a micro-batch between its forward and its backward, its input and nothing else: the backward computes the forward again.
The input of the first stage are tokens, which are in the batch.
"""

from parallel.pipeline.schedule import Forward, Recv, Send, inputs, users


class Executor:
    """Runs lists of actions. A message is a tuple of tensors.

    stages: of all ranks. send(message, rank) does not wait; receive(action, rank) -> what that rank sent as the input of the action, asked
    for in the order of its sending. live: the most micro-batches whose inputs a run held at a time.
    """

    def __init__(self, stages, send, receive):
        self.stages, self.send, self.receive, self.live = stages, send, receive, 0

    def run(self, actions, forward, backward=None):
        """forward(action, inputs) -> message for the next stage; backward(action, inputs, cotangents) -> message for the one before. At the
        ends of the model they are given (). Without `backward` nothing is kept."""
        received, coming, made, kept = {}, {}, {}, {}

        def arrived(action):
            if inputs(action, self.stages) is None:
                return ()
            while action not in received:
                rank = next(rank for rank, queue in coming.items() if action in queue)
                first = coming[rank].pop(0)
                received[first] = self.receive(first, rank)
            return received.pop(action)

        for action in actions:
            if isinstance(action, Recv):
                coming.setdefault(action.rank, []).append(action.action)
            elif isinstance(action, Send):
                self.send(made.pop(action.action), action.rank)
            elif isinstance(action, Forward):
                x = arrived(action)
                if backward:
                    kept[action.micro, action.stage] = x
                    self.live = max(self.live, len(kept))
                self._made(made, action, forward(action, x))
                del x
            else:
                cotangents = arrived(action)
                self._made(made, action, backward(action, kept.pop((action.micro, action.stage)), cotangents))
                del cotangents
        assert not (received or made or kept or any(coming.values())), "actions without their counterparts"

    def _made(self, made, action, message):
        user = users(action, self.stages)
        if user is not None:
            made[user] = message
