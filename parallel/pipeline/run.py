"""Runs a rank's list of pipeline actions on the host, and keeps the inputs of its stages from forward to backward.

Between the forward and the backward of a micro-batch a stage keeps only its input; the backward computes the forward again. The first stage
keeps nothing: its input is the tokens of the batch.
"""

from parallel.pipeline.schedule import Forward, Recv, Send, inputs, users


class Executor:
    """Runs lists of actions. Stages pass messages, which are tuples of tensors.

    stages: the number of stages of all ranks. send(message, rank): sends without waiting. receive(action, rank): returns the message from
    that rank that is the input of the action; it is called in the order of sending. live: the largest number of stage inputs that were kept
    at a time.
    """

    def __init__(self, stages, send, receive):
        self.stages, self.send, self.receive, self.live = stages, send, receive, 0

    def run(self, actions, forward, backward=None):
        """Runs a list of actions.

        forward(action, inputs): returns the message for the next stage. backward(action, inputs, cotangents): returns the message for the
        previous stage. inputs is () in the first stage, cotangents is () in the last. Without `backward` no inputs are kept.
        """
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
