"""Lightning Fabric, where the loop is yours: `python examples/fabric.py`."""

import lightning as L
import torch
from digits import loaders, network
from torch.nn import functional as F

from lightning_radam import configure_radam

EPOCHS = 8


def main() -> float:
    L.seed_everything(0)
    fabric = L.Fabric(accelerator="auto", devices=1)
    train, val = fabric.setup_dataloaders(*loaders())
    net = network()
    # Without a trainer nobody counts the updates, so total_steps is said.
    configured = configure_radam(net, lr=0.01, betas=(0.9, 0.99), total_steps=EPOCHS * len(train))
    net, optimizer = fabric.setup(net, configured["optimizer"])
    scheduler = configured["lr_scheduler"]["scheduler"]
    for _ in range(EPOCHS):
        net.train()
        for images, labels in train:
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(net(images), labels))
            optimizer.step()
            scheduler.step()
    net.eval()
    with torch.no_grad():
        hits = torch.cat([net(images).argmax(1) == labels for images, labels in val])
    accuracy = hits.float().mean().item()
    print(f"validation accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
