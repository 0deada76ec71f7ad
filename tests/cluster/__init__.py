"""Several brokers, found through ZooKeeper: programs work while brokers, ZooKeeper and lines between them fail."""
