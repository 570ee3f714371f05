"""LightningModules as people write them who have never heard of LoRA, each in the manner of its own corner."""

import copy
import math
from itertools import pairwise

import lightning as L
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

# ---------------------------------------------------------------------------------------------------------- data


def vectors():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(32, 8, generator=g)
    return DataLoader(TensorDataset(x, (x @ torch.randn(8, 4, generator=g)).argmax(1)), batch_size=8)


def images():
    g = torch.Generator().manual_seed(2)
    x = torch.randn(16, 1, 8, 8, generator=g)
    return DataLoader(TensorDataset(x, (x.mean((1, 2, 3)) > 0).long()), batch_size=4)


def sentences():
    """Token ids that are padded with 0 after varying lengths, labelled by their first token."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 20, (32, 7), generator=g)
    ids[torch.arange(7) >= torch.randint(3, 8, (32, 1), generator=g)] = 0
    rows = [{"input_ids": row, "attention_mask": (row != 0).long(), "labels": (row[0] > 10).long()} for row in ids]
    return DataLoader(rows, batch_size=8)


def mlp(*sizes, act=nn.ReLU):
    layers = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), act()]
    return nn.Sequential(*layers[:-1])


# --------------------------------------------------------------------------------------------------- adversaries


class GAN(L.LightningModule):
    """Lightning's own GAN example: two optimizers, toggled by hand."""

    def __init__(self, latent=4, lr=1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = mlp(latent, 16, 8)
        self.discriminator = mlp(8, 16, 1)

    def forward(self, z):
        return self.generator(z)

    def adversarial_loss(self, y_hat, y):
        return F.binary_cross_entropy_with_logits(y_hat, y)

    def training_step(self, batch):
        x, _ = batch
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(x.shape[0], self.hparams.latent).type_as(x)
        valid, fake = torch.ones(x.size(0), 1).type_as(x), torch.zeros(x.size(0), 1).type_as(x)

        self.toggle_optimizer(optimizer_g)
        g_loss = self.adversarial_loss(self.discriminator(self(z)), valid)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)

        self.toggle_optimizer(optimizer_d)
        real_loss = self.adversarial_loss(self.discriminator(x), valid)
        fake_loss = self.adversarial_loss(self.discriminator(self(z).detach()), fake)
        d_loss = (real_loss + fake_loss) / 2
        self.log("d_loss", d_loss, prog_bar=True)
        self.manual_backward(d_loss)
        optimizer_d.step()
        optimizer_d.zero_grad()
        self.untoggle_optimizer(optimizer_d)

    def configure_optimizers(self):
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=self.hparams.lr, betas=(0.5, 0.999))
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=self.hparams.lr, betas=(0.5, 0.999))
        return [opt_g, opt_d], []


def set_requires_grad(nets, requires_grad=False):
    for net in nets:
        for param in net.parameters():
            param.requires_grad = requires_grad


class Pix2Pix(GAN):
    """Switches the discriminator's gradients by hand, as the code of pix2pix does."""

    def training_step(self, batch):
        x, _ = batch
        optimizer_G, optimizer_D = self.optimizers()
        fake = self(torch.randn(len(x), 4))
        set_requires_grad([self.discriminator], True)
        optimizer_D.zero_grad()
        self.manual_backward(self.discriminator(fake.detach()).mean() - self.discriminator(x).mean())
        optimizer_D.step()
        set_requires_grad([self.discriminator], False)
        optimizer_G.zero_grad()
        self.manual_backward(-self.discriminator(fake).mean())
        optimizer_G.step()


class CycleGAN(GAN):
    """Switches them back on at the end of the step, as the code of CycleGAN does."""

    def training_step(self, batch):
        x, _ = batch
        optimizer_G, optimizer_D = self.optimizers()
        fake = self(torch.randn(len(x), 4))
        set_requires_grad([self.discriminator], False)
        optimizer_G.zero_grad()
        self.manual_backward(-self.discriminator(fake).mean())
        optimizer_G.step()
        set_requires_grad([self.discriminator], True)
        optimizer_D.zero_grad()
        self.manual_backward(self.discriminator(fake.detach()).mean() - self.discriminator(x).mean())
        optimizer_D.step()


class SpectralGAN(GAN):
    def __init__(self):
        super().__init__()
        sn = nn.utils.parametrizations.spectral_norm
        self.discriminator = nn.Sequential(sn(nn.Linear(8, 16)), nn.LeakyReLU(0.2), nn.Linear(16, 1))


class OldSpectralGAN(GAN):
    """Spectral norm as it was before PyTorch had parametrizations."""

    def __init__(self):
        super().__init__()
        sn = nn.utils.spectral_norm
        self.discriminator = nn.Sequential(sn(nn.Linear(8, 16)), nn.LeakyReLU(0.2), nn.Linear(16, 1))


class WGANGP(L.LightningModule):
    """The generator learns on every third batch only; the critic has a gradient penalty."""

    n_critic = 3

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.G = mlp(4, 16, 8)
        self.D = mlp(8, 16, 1, act=nn.Tanh)

    def forward(self, z):
        return self.G(z)

    def gradient_penalty(self, real, fake):
        alpha = torch.rand(len(real), 1)
        interpolates = (alpha * real + (1 - alpha) * fake).requires_grad_(True)
        (gradients,) = torch.autograd.grad(self.D(interpolates).sum(), interpolates, create_graph=True)
        return ((gradients.norm(2, dim=1) - 1) ** 2).mean()

    def training_step(self, batch, batch_idx):
        x = batch[0]
        opt_g, opt_d = self.optimizers()
        fake = self.G(torch.randn(len(x), 4)).detach()
        d_loss = self.D(fake).mean() - self.D(x).mean() + 10 * self.gradient_penalty(x, fake)
        opt_d.zero_grad()
        self.manual_backward(d_loss)
        opt_d.step()
        if (batch_idx + 1) % self.n_critic == 0:
            g_loss = -self.D(self.G(torch.randn(len(x), 4))).mean()
            opt_g.zero_grad()
            self.manual_backward(g_loss)
            opt_g.step()

    def configure_optimizers(self):
        return [torch.optim.RMSprop(net.parameters(), lr=1e-3) for net in (self.G, self.D)]


class ClippedWGAN(WGANGP):
    """The older recipe: no penalty, but the critic's weights are clipped."""

    n_critic = 1

    def gradient_penalty(self, real, fake):
        return 0

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        for p in self.D.parameters():
            p.data.clamp_(-0.01, 0.01)


class AdversarialAutoencoder(L.LightningModule):
    """Two optimizers train the encoder: one to reconstruct, one to fool the discriminator."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.encoder = mlp(8, 16, 3)
        self.decoder = mlp(3, 16, 8)
        self.discriminator = mlp(3, 16, 1)

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def training_step(self, batch, batch_idx):
        x = batch[0]
        opt_ae, opt_d, opt_gen = self.optimizers()
        opt_ae.zero_grad()
        self.manual_backward(F.mse_loss(self(x), x))
        opt_ae.step()
        opt_d.zero_grad()
        fake = self.discriminator(self.encoder(x).detach())
        self.manual_backward(F.softplus(fake).mean() + F.softplus(-self.discriminator(torch.randn(len(x), 3))).mean())
        opt_d.step()
        opt_gen.zero_grad()
        self.manual_backward(F.softplus(-self.discriminator(self.encoder(x))).mean())
        opt_gen.step()

    def configure_optimizers(self):
        return (
            torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()], lr=1e-3),
            torch.optim.Adam(self.discriminator.parameters(), lr=1e-3),
            torch.optim.Adam(self.encoder.parameters(), lr=1e-4),
        )


# ------------------------------------------------------------------------------------- optimizers in every manner


class Classifier(L.LightningModule):
    """The module of every tutorial; many below change one thing about it."""

    def __init__(self, lr=1e-2):
        super().__init__()
        self.lr = lr
        self.net = mlp(8, 16, 4)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class ByHand(Classifier):
    """Manual optimization: accumulation, clipping, and two schedulers stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.net(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.manual_backward(F.cross_entropy(self(x), y) / 2)
        if (batch_idx + 1) % 2 == 0:
            clip_grad_norm_(self.parameters(), 1.0)
            for opt, sch in zip(self.optimizers(), self.lr_schedulers(), strict=True):
                self.clip_gradients(opt, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
                opt.step()
                sch.step()
                opt.zero_grad()

    def configure_optimizers(self):
        body = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        head = torch.optim.SGD(self.head.parameters(), lr=1e-1, momentum=0.9)
        return [body, head], [
            torch.optim.lr_scheduler.OneCycleLR(body, max_lr=1e-2, total_steps=10),
            torch.optim.lr_scheduler.CosineAnnealingLR(head, T_max=10, eta_min=1e-3),
        ]


class DecayByName(Classifier):
    """Two groups by name, as in the examples of transformers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))

    def configure_optimizers(self):
        no_decay = ["bias", "1.weight"]
        named = list(self.named_parameters())
        groups = [
            {"params": [p for n, p in named if not any(nd in n for nd in no_decay)], "weight_decay": 0.1},
            {"params": [p for n, p in named if any(nd in n for nd in no_decay)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class DecayByClass(DecayByName):
    """The configure_optimizers of minGPT: it sorts parameters by the class of their module, and counts them."""

    def configure_optimizers(self):
        decay, no_decay = set(), set()
        for mn, m in self.named_modules():
            for pn, _ in m.named_parameters():
                fpn = f"{mn}.{pn}" if mn else pn
                if pn.endswith("bias") or (pn.endswith("weight") and isinstance(m, nn.LayerNorm)):
                    no_decay.add(fpn)
                elif pn.endswith("weight") and isinstance(m, nn.Linear):
                    decay.add(fpn)
        param_dict = dict(self.named_parameters())
        assert len(decay & no_decay) == 0
        missing = param_dict.keys() - (decay | no_decay)
        assert len(missing) == 0, f"parameters {missing} were not separated into either decay/no_decay set!"
        groups = [
            {"params": [param_dict[pn] for pn in sorted(decay)], "weight_decay": 0.1},
            {"params": [param_dict[pn] for pn in sorted(no_decay)], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr)


class LayerwiseRates(Classifier):
    """The further from the classifier, the smaller the learning rate."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.classifier = nn.Linear(8, 4)

    def forward(self, x):
        for layer in self.net:
            x = torch.tanh(layer(x))
        return self.classifier(x)

    def configure_optimizers(self):
        groups = [{"params": self.classifier.parameters(), "lr": self.lr, "name": "classifier"}]
        for depth, layer in enumerate(reversed(self.net)):
            groups.append({"params": layer.parameters(), "lr": self.lr * 0.5 ** (depth + 1), "name": f"layer{depth}"})
        optimizer = torch.optim.AdamW(groups)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda epoch: 0.9**epoch] * len(groups))]


class FromCommandLine(L.LightningModule):
    """No configure_optimizers: LightningCLI builds the optimizer from its arguments."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.net = mlp(8, width, 4)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def train_dataloader(self):
        return vectors()


class WarmsUp(Classifier):
    """Overrides optimizer_step to warm the learning rate up, as Lightning's documentation shows."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)
        if self.trainer.global_step < 500:
            lr_scale = min(1.0, float(self.trainer.global_step + 1) / 500.0)
            for pg in optimizer.param_groups:
                pg["lr"] = lr_scale * self.lr


class SecondOrder(Classifier):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4, history_size=5)


class OnlyTheHead(Classifier):
    """Transfer learning: the backbone is frozen, and the optimizer gets what is left of the head."""

    def __init__(self):
        super().__init__()
        self.net = mlp(8, 16, 16)
        self.net.requires_grad_(False)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.net(x))

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.head.parameters() if p.requires_grad], lr=self.lr)


# ----------------------------------------------------------------------------------------- teachers and averages


class Distillation(L.LightningModule):
    """A frozen teacher is an attribute of the module."""

    def __init__(self):
        super().__init__()
        self.teacher = mlp(8, 32, 32, 4)
        self.student = mlp(8, 16, 4)
        self.teacher.eval()
        for p in self.teacher.parameters():
            p.requires_grad = False

    def forward(self, x):
        return self.student(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.student(x)
        with torch.no_grad():
            soft = self.teacher(x)
        kd = F.kl_div(F.log_softmax(logits / 2, -1), F.softmax(soft / 2, -1), reduction="batchmean")
        return F.cross_entropy(logits, y) + 4 * kd

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class KeepsAnAverage(Classifier):
    """A moving average of the weights, kept by hand and used to test."""

    def __init__(self):
        super().__init__()
        self.ema = copy.deepcopy(self.net)
        self.ema.requires_grad_(False)

    def forward(self, x):
        return self.net(x) if self.training else self.ema(x)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for e, p in zip(self.ema.parameters(), self.net.parameters(), strict=True):
                e.lerp_(p, 0.1)


class BYOL(L.LightningModule):
    """The target network follows the online network with momentum."""

    def __init__(self):
        super().__init__()
        self.online = mlp(8, 16, 8)
        self.predictor = nn.Linear(8, 8)
        self.target = copy.deepcopy(self.online)

    def training_step(self, batch, batch_idx):
        x = batch[0]
        a, b = x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x)
        with torch.no_grad():
            goal = self.target(b)
        return 2 - 2 * F.cosine_similarity(self.predictor(self.online(a)), goal, dim=-1).mean()

    def on_before_zero_grad(self, optimizer):
        for online, target in zip(self.online.parameters(), self.target.parameters(), strict=True):
            target.data = target.data * 0.99 + online.data * 0.01

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


# ----------------------------------------------------------------------------------------- where the model is built


class BuiltInSetup(Classifier):
    """Builds the model once the data module is there."""

    def __init__(self):
        super().__init__()
        self.net = None

    def setup(self, stage):
        if self.net is None:
            torch.manual_seed(5)
            self.net = mlp(8, 16, 4)


class BuiltOnMeta(Classifier):
    """Builds on the meta device in configure_model, then loads the pretrained weights."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights
        self.net = None

    def configure_model(self):
        if self.net is not None:
            return
        with torch.device("meta"):
            self.net = mlp(8, 16, 4)
        self.net.to_empty(device="cpu")
        self.net.load_state_dict(torch.load(self.weights))


class Lazy(Classifier):
    """Leaves the first size to PyTorch."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 4))


class Compiled(Classifier):
    def __init__(self):
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


class Configured(Classifier):
    """All that it takes to build it again is in its hyperparameters."""

    def __init__(self, sizes, act="ReLU", lr=1e-2):
        super().__init__(lr)
        self.save_hyperparameters()
        torch.manual_seed(11)
        self.net = mlp(*sizes, act=getattr(nn, act))


# --------------------------------------------------------------------------------------------------- architectures


class ConvNet(Classifier):
    """Convolutions and batch norm below a linear head."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 16), nn.ReLU()
        )
        self.fc = nn.Linear(16, 2)

    def forward(self, x):
        return self.fc(self.net(x))


class Tagger(L.LightningModule):
    """An LSTM beside linear layers."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 8, padding_idx=0)
        self.lstm = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
        self.proj = nn.Linear(16, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, ids):
        states, _ = self.lstm(self.emb(ids))
        return self.out(torch.tanh(self.proj(states.mean(1))))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["input_ids"]), batch["labels"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class PaddedEncoder(L.LightningModule):
    """nn.TransformerEncoder with padding masks, validated every epoch."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 2)

    def forward(self, ids):
        h = self.encoder(self.embed(ids) * math.sqrt(16), src_key_padding_mask=ids == 0)
        return self.head(h[:, 0])

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch["input_ids"]), batch["labels"])
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch["input_ids"]), batch["labels"]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class VAE(L.LightningModule):
    def __init__(self, beta=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = mlp(8, 16)
        self.fc_mu = nn.Linear(16, 2)
        self.fc_var = nn.Linear(16, 2)
        self.decoder = mlp(2, 16, 8)

    def forward(self, x):
        return self.decoder(self.fc_mu(self.encoder(x)))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        hidden = self.encoder(x)
        q = torch.distributions.Normal(self.fc_mu(hidden), torch.exp(self.fc_var(hidden) / 2))
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
        return F.mse_loss(self.decoder(q.rsample()), x) + self.hparams.beta * kl

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class TwoTowers(L.LightningModule):
    """The two towers of a contrastive model are one encoder."""

    def __init__(self):
        super().__init__()
        encoder = mlp(8, 16, 8)
        self.query_encoder = encoder
        self.passage_encoder = encoder

    def forward(self, x):
        return F.normalize(self.query_encoder(x), dim=-1)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        q = F.normalize(self.query_encoder(x), dim=-1)
        p = F.normalize(self.passage_encoder(x.flip(1)), dim=-1)
        return F.cross_entropy(10 * q @ p.T, torch.arange(len(x)))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Prefix(Classifier):
    """Learns a raw parameter in front of the network."""

    def __init__(self):
        super().__init__()
        self.prefix = nn.Parameter(torch.zeros(3))
        self.net = mlp(11, 16, 4)

    def forward(self, x):
        return self.net(torch.cat([self.prefix.expand(len(x), -1), x], 1))


class MetricLearning(L.LightningModule):
    """Metrics are submodules, and the memory bank is a buffer of the module itself."""

    def __init__(self):
        super().__init__()
        self.trunk = mlp(8, 16, 8)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(4)
        self.scores = torchmetrics.MetricCollection([torchmetrics.classification.MulticlassF1Score(4)])
        self.register_buffer("bank", torch.zeros(4, 8))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        return F.normalize(self.trunk(x), dim=-1) @ self.bank.T

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = F.normalize(self.trunk(x), dim=-1)
        with torch.no_grad():
            for c in y.unique():
                self.bank[c] = F.normalize(0.9 * self.bank[c] + 0.1 * z[y == c].mean(0), dim=0)
            self.seen += len(x)
        logits = z @ self.bank.T / 0.1
        self.accuracy(logits, y)
        self.log("train_acc", self.accuracy, on_epoch=True)
        return F.cross_entropy(logits, y)

    def validation_step(self, batch, batch_idx):
        self.scores.update(self(batch[0]), batch[1])

    def on_validation_epoch_end(self):
        self.log_dict(self.scores.compute())
        self.scores.reset()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Queue(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("keys", torch.zeros(16, 4))

    def push(self, z):
        self.keys = torch.cat([z.detach(), self.keys])[:16]


class RemembersKeys(Classifier):
    """A queue of past keys in a submodule, replaced at each step."""

    def __init__(self):
        super().__init__()
        self.queue = Queue()

    def training_step(self, batch, batch_idx):
        z = self(batch[0])
        loss = F.softplus(z @ self.queue.keys.T).mean() + z.square().mean()
        self.queue.push(z)
        return loss


class Codebook(nn.Module):
    """Codes that follow the data by moving averages, in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(4, 8))

    def forward(self, z):
        nearest = torch.cdist(z, self.codes).argmin(1)
        if self.training:
            with torch.no_grad():
                for c in nearest.unique():
                    self.codes[c].lerp_(z[nearest == c].mean(0), 0.1)
        return z + (self.codes[nearest] - z).detach()


class Quantizes(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), Codebook(), nn.Linear(8, 4))


class Observer(nn.Module):
    """Records the range of what passes, in training and in validation."""

    def __init__(self):
        super().__init__()
        self.register_buffer("high", torch.zeros(()))

    def forward(self, x):
        with torch.no_grad():
            self.high = torch.maximum(self.high, x.amax())
        return x


class Observes(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), Observer(), nn.Linear(8, 4))


class MultiTask(L.LightningModule):
    """Two heads, used in turn."""

    def __init__(self):
        super().__init__()
        self.body = mlp(8, 16, 16)
        self.heads = nn.ModuleDict({"topic": nn.Linear(16, 4), "style": nn.Linear(16, 4)})

    def forward(self, x, task="topic"):
        return self.heads[task](self.body(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x, ("topic", "style")[batch_idx % 2]), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Checkpointed(Classifier):
    """Saves memory by activation checkpointing."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)])
        self.net = nn.Linear(8, 4)

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.net(x)


class CheckpointedWhole(Classifier):
    """All that is trained is inside the checkpointed part."""

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=True)


class ReadsTheWeight(Classifier):
    """Uses the weight of a layer without ever calling the layer."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.net(x), self.lin.weight)


class TiedAutoencoder(L.LightningModule):
    """Encoder and decoder have one weight."""

    def __init__(self):
        super().__init__()
        self.enc = nn.Linear(8, 8, bias=False)
        self.dec = nn.Linear(8, 8, bias=False)
        self.dec.weight = self.enc.weight

    def forward(self, x):
        return self.dec(torch.tanh(self.enc(x)))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class RawParameters(L.LightningModule):
    """Parameters and functions, no layers."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(16, 8) * 0.1)
        self.w2 = nn.Parameter(torch.randn(4, 16) * 0.1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(F.linear(F.relu(F.linear(x, self.w1)), self.w2), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class MaskedLinear(nn.Linear):
    """The layer of MADE: its mask keeps an output from seeing later inputs."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.register_buffer("mask", torch.ones(n_out, n_in).tril())

    def forward(self, x):
        return F.linear(x, self.mask * self.weight, self.bias)


class Autoregressive(Classifier):
    def __init__(self):
        super().__init__()
        self.made = MaskedLinear(8, 8)

    def forward(self, x):
        return self.net(self.made(x))


class CastingLinear(nn.Linear):
    """Casts its input, as diffusion code does."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class Casts(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(CastingLinear(8, 16), nn.ReLU(), CastingLinear(16, 4))


class Houlsby(Classifier):
    """Has adapters of its own, by the name that everybody gives them."""

    def __init__(self):
        super().__init__()
        self.adapters = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x):
        x = self.net(x)
        return x + self.adapters[0](x)


class KeepsNotes(Classifier):
    """Adds to its checkpoints, and repairs shapes when loading with the snippet from the forum."""

    def __init__(self):
        super().__init__()
        self.vocabulary = {}

    def on_train_start(self):
        self.vocabulary["the"] = 0

    def on_save_checkpoint(self, checkpoint):
        checkpoint["vocabulary"] = self.vocabulary

    def on_load_checkpoint(self, checkpoint):
        self.vocabulary = checkpoint["vocabulary"]
        state_dict = checkpoint["state_dict"]
        model_state_dict = self.state_dict()
        is_changed = False
        for k in state_dict:
            if k in model_state_dict and state_dict[k].shape != model_state_dict[k].shape:
                state_dict[k] = model_state_dict[k]
                is_changed = True
        if is_changed:
            checkpoint.pop("optimizer_states", None)


class HidesTheEncoder(Classifier):
    """Keeps the pretrained encoder out of its checkpoints by overriding state_dict."""

    def __init__(self):
        super().__init__()
        self.encoder = mlp(8, 8)
        self.strict_loading = False

    def forward(self, x):
        return self.net(self.encoder(x))

    def state_dict(self, *args, **kwargs):
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if not k.startswith("encoder.")}


# --------------------------------------------------------------------------------------------------- transformers


class HFClassifier(L.LightningModule):
    """A model of transformers that has labels returns its loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids).logits

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class HFLanguageModel(HFClassifier):
    def training_step(self, batch, batch_idx):
        ids = batch["input_ids"]
        return self.model(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss


class HFSeq2Seq(HFLanguageModel):
    def forward(self, ids):
        return self.model(input_ids=ids, decoder_input_ids=ids).logits
