from .base import Environment, Step


class SingleTurn(Environment):
    def step(self, message):
        return Step(done=True)
