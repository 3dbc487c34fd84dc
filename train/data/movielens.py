"""MovieLens 100K, 1M and 25M as columns, from any of their published layouts."""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np

from jaxembed.inputs import RaggedTensor

from .text_tables import Row, read_ratings, read_rows

UNKNOWN = "unknown"
# Lower bounds of the age groups of MovieLens-1M; group 0 is for users of unknown age.
AGE_BOUNDS = (0, 18, 25, 35, 45, 50, 56)
AGE_GROUPS = (UNKNOWN, "under 18", "18-24", "25-34", "35-44", "45-49", "50-55", "56 and over")
_GENRES_100K = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
]
_OCCUPATIONS_1M = [
    "other",
    "academic/educator",
    "artist",
    "clerical/admin",
    "college/grad student",
    "customer service",
    "doctor/health care",
    "executive/managerial",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales/marketing",
    "scientist",
    "self-employed",
    "technician/engineer",
    "tradesman/craftsman",
    "unemployed",
    "writer",
]


@dataclasses.dataclass(frozen=True, eq=False)
class MovieLens:
    """E ratings by U users of I items. Every id is contiguous from 0, in the order of the original ids.

    Attributes:
      user: [E] int32 in [0, U).
      item: [E] int32 in [0, I).
      rating: [E] float32, 0.5 to 5.
      timestamp: [E] int64 seconds.
      age: [U] int32 index into `AGE_GROUPS`.
      occupation: [U] int32 index into `occupation_names`.
      genres: I bags of indices into `genre_names`.
      year: [I] int32 year of release, 0 where unknown.
      user_ids: [U] the data set's own ids.
      item_ids: [I] the data set's own ids.
      titles: I titles.
      genre_names: names of the genres.
      occupation_names: names of the occupations; the first is "unknown".
    """

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    timestamp: np.ndarray
    age: np.ndarray
    occupation: np.ndarray
    genres: RaggedTensor
    year: np.ndarray
    user_ids: np.ndarray
    item_ids: np.ndarray
    titles: tuple[str, ...]
    genre_names: tuple[str, ...]
    occupation_names: tuple[str, ...]

    @property
    def num_users(self) -> int:
        """U."""
        return self.user_ids.shape[0]

    @property
    def num_items(self) -> int:
        """I."""
        return self.item_ids.shape[0]


def load(path: str | os.PathLike[str]) -> MovieLens:
    """Reads a data set, finding out from the files in `path` which layout it has.

    - `*.inter`, `*.item`, `*.user`: RecBole's, as `fetch` places them;
    - `u.data`, `u.item`, `u.user`: GroupLens's MovieLens-100K;
    - `ratings.dat`, `movies.dat`, `users.dat`: MovieLens-1M;
    - `ratings.csv`, `movies.csv`: MovieLens-25M and its like (20M, latest), which know nothing of the users.

    Raises:
      FileNotFoundError: if `path` holds none of them.
      ValueError: if a line is not of its layout, naming file and line.
    """
    path = Path(path)
    if (path / "u.data").is_file():
        return _load_100k(path)
    if (path / "ratings.dat").is_file():
        return _load_1m(path)
    if (path / "ratings.csv").is_file():
        return _load_25m(path)
    inter = sorted(path.glob("*.inter"))
    if len(inter) == 1:
        return _load_recbole(inter[0])
    raise FileNotFoundError(
        f"{path} must hold a MovieLens data set (*.inter, u.data, ratings.dat or ratings.csv), got "
        f"{sorted(entry.name for entry in path.iterdir()) if path.is_dir() else 'no such directory'}; "
        "jaxembed.train.data.fetch gets MovieLens-100K."
    )


def data_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files that `load` reads."""
    path = Path(path)
    for names in (
        ("u.data", "u.item", "u.user"),
        ("ratings.dat", "movies.dat", "users.dat"),
        ("ratings.csv", "movies.csv"),
    ):
        if (path / names[0]).is_file():
            return [path / name for name in names]
    return [inter.with_suffix(end) for inter in path.glob("*.inter") for end in (".inter", ".item", ".user")]


def _load_recbole(inter: Path) -> MovieLens:
    item_rows = read_rows(inter.with_suffix(".item"), "\t", 4, skip=1)
    user_rows = read_rows(inter.with_suffix(".user"), "\t", 4, skip=1)
    return _build(
        read_ratings(inter, "\t", skip=1),
        {r.whole(0, "item"): (r[1], r[2], r[3].split()) for r in item_rows},
        {r.whole(0, "user"): (_age_group(r, 1), r[3]) for r in user_rows},
    )


def _load_100k(path: Path) -> MovieLens:
    item_rows = read_rows(path / "u.item", "|", 5 + len(_GENRES_100K), encoding="latin-1", exact=True)
    user_rows = read_rows(path / "u.user", "|", 4, encoding="latin-1")

    def genres(row):
        flags = [row.whole(i, "a flag of a genre", 2) for i in range(5, len(row.fields))]
        return [genre for genre, flag in zip(_GENRES_100K, flags, strict=True) if flag]

    return _build(
        read_ratings(path / "u.data", "\t"),
        {r.whole(0, "item"): (_untitle(r[1]), r[2], genres(r)) for r in item_rows},
        {r.whole(0, "user"): (_age_group(r, 1), r[3]) for r in user_rows},
    )


def _load_1m(path: Path) -> MovieLens:
    item_rows = read_rows(path / "movies.dat", "::", 3, encoding="latin-1")
    user_rows = read_rows(path / "users.dat", "::", 4, encoding="latin-1")

    def occupation(row):
        return _OCCUPATIONS_1M[row.whole(3, "occupation", len(_OCCUPATIONS_1M))]

    return _build(
        read_ratings(path / "ratings.dat", "::"),
        {r.whole(0, "item"): (_untitle(r[1]), r[1], [g for g in r[2].split("|") if g]) for r in item_rows},
        {r.whole(0, "user"): (_age_group(r, 2), occupation(r)) for r in user_rows},
    )


def _load_25m(path: Path) -> MovieLens:
    def genres(row):
        return [] if row[2] == "(no genres listed)" else row[2].split("|")

    item_rows = read_rows(path / "movies.csv", ",", 3, skip=1)
    return _build(
        read_ratings(path / "ratings.csv", ",", skip=1),
        {r.whole(0, "item"): (_untitle(r[1]), r[1], genres(r)) for r in item_rows},
        {},
    )


def _build(
    ratings: np.ndarray,
    items: dict[int, tuple[str, str, list[str]]],
    users: dict[int, tuple[int, str]],
) -> MovieLens:
    """From [E, 4] ratings; items as title, text with the year of release, genres; users as group of age, occupation."""
    columns = ratings[:, 0].astype(np.int64), ratings[:, 1].astype(np.int64)
    user_ids = np.union1d(columns[0], np.fromiter(users, np.int64))
    item_ids = np.union1d(columns[1], np.fromiter(items, np.int64))
    of_items = [items.get(i, (str(i), "", [])) for i in item_ids.tolist()]
    of_users = [users.get(u, (0, UNKNOWN)) for u in user_ids.tolist()]
    genre_names = sorted({genre for _, _, genres in of_items for genre in genres})
    genre_index = {name: i for i, name in enumerate(genre_names)}
    occupations = [UNKNOWN, *sorted({occupation for _, occupation in of_users} - {UNKNOWN})]
    occupation_index = {name: i for i, name in enumerate(occupations)}
    return MovieLens(
        user=np.searchsorted(user_ids, columns[0]).astype(np.int32),
        item=np.searchsorted(item_ids, columns[1]).astype(np.int32),
        rating=ratings[:, 2].astype(np.float32),
        timestamp=ratings[:, 3].astype(np.int64),
        age=np.asarray([age for age, _ in of_users], np.int32),
        occupation=np.asarray([occupation_index[occupation] for _, occupation in of_users], np.int32),
        genres=RaggedTensor.from_lists(
            [sorted(genre_index[g] for g in genres) for _, _, genres in of_items], np.int32
        ),
        year=np.asarray([_year(text) for _, text, _ in of_items], np.int32),
        user_ids=user_ids,
        item_ids=item_ids,
        titles=tuple(title for title, _, _ in of_items),
        genre_names=tuple(genre_names),
        occupation_names=tuple(occupations),
    )


def _age_group(row: Row, at: int) -> int:
    return int(np.searchsorted(AGE_BOUNDS, row.whole(at, "age", 200), side="right")) if row[at] else 0


def _year(text: str) -> int:
    """The last number of four digits, as in "Toy Story (1995)", "01-Jan-1995" and "1995"; 0 without one."""
    years = re.findall(r"(?<!\d)(?:18|19|20)\d\d(?!\d)", text)
    return int(years[-1]) if years else 0


def _untitle(title: str) -> str:
    return re.sub(r"\s*\(\d{4}\)\s*$", "", title)
