"""The registry in ZooKeeper: which broker serves what, and which group is bound to what."""
