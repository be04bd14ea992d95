"""Fields that say in their types what they may be, and groups of them."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Literal

import pytest

from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import ConfigGroup, NeedsPackage, OneOf, PositiveInt, Range, Share, marked_fields
from atomdiff.utils.options import parse_config

TABLE = {"bus": SimpleNamespace(help="slow"), "tram": SimpleNamespace(help="on rails")}


@dataclass(frozen=True, kw_only=True)
class Travel(ConfigGroup):
    """Way to travel."""

    vehicle: Annotated[str, OneOf(TABLE)] = "bus"
    """Vehicle."""
    seats: PositiveInt | None = None
    """Seats."""

    def check(self):
        if self.vehicle == "tram" and self.seats == 1:
            raise UserError("seats=1: expected more in a tram")


@dataclass(frozen=True, kw_only=True)
class Trip(Travel):
    """Plan a trip."""

    fill: Share = 0.5
    """Share of the seats that are taken."""
    speed: Annotated[float, Range(1, 80)] = 30.0
    """Speed."""
    pace: Literal["easy", "fast"] | None = None
    """Pace."""
    map: Annotated[bool, NeedsPackage("maps", "travel")] = False
    """Show a map."""
    stops: tuple[str, ...] = ()
    """Stops."""
    day: int = 0
    """Day."""

    def check(self):
        if self.pace == "fast" and self.speed < 30:
            raise UserError(f"speed={self.speed}: expected 30 or more with pace fast")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seats": 0}, "seats=0: expected a number of at least 1 and below 1000000000"),
        ({"seats": 2.5}, "seats=2.5: expected a whole number"),
        ({"seats": True}, "seats=True: expected a whole number"),
        ({"fill": "half"}, "fill='half': expected a number"),
        ({"fill": None}, "fill=None: expected a number"),
        ({"stops": "home"}, r"stops='home': expected a tuple, such as \('home',\)"),
        ({"stops": ("home", 3)}, "stops=3: expected a text"),
        ({"map": "no"}, "map='no': expected True or False"),
        ({"map": 1}, "map=1: expected True or False"),
        ({"day": 2.5}, "day=2.5: expected a whole number"),
        ({"vehicle": ["bus"]}, r"vehicle=\['bus'\]: expected a text"),
        ({"fill": 1.0}, "fill=1.0: expected a number of at least 0 and below 1"),
        ({"speed": 81.0}, "speed=81.0: expected a number of at least 1 and at most 80"),
        ({"speed": float("nan")}, "speed=nan: expected"),
        ({"pace": "slow"}, "pace='slow': expected one of easy, fast or none"),
        ({"vehicle": "car"}, "vehicle='car': expected one of bus, tram$"),
        ({"vehicle": None}, "vehicle=None: expected a text$"),
        ({"vehicle": "tram", "seats": 1}, "seats=1: expected more in a tram"),
        ({"pace": "fast", "speed": 1.0}, "speed=1.0: expected 30 or more with pace fast"),
    ],
)
def test_a_field_and_every_group_is_checked(fields, message):
    Trip(), Trip(seats=80, pace="easy", vehicle="tram", speed=30, stops=["home"])
    with pytest.raises(UserError, match=message):
        Trip(**fields)


def test_marks_are_found_in_all_groups():
    assert marked_fields(Trip, NeedsPackage) == {"map": NeedsPackage("maps", "travel")}
    assert set(marked_fields(Trip, Range)) == {"seats", "fill", "speed"}


def test_help_has_a_section_for_each_group_and_the_entries_of_a_table(capsys):
    with pytest.raises(SystemExit):
        parse_config(Trip, ["--help"])
    own, inherited = " ".join(capsys.readouterr().out.split()).split("Way to travel:")
    assert "--speed FLOAT Speed. (default: 30.0)" in own and "--pace {easy,fast} Pace." in own
    assert "--vehicle {bus,tram} Vehicle. bus: slow; tram: on rails. (default: bus)" in inherited
    assert "--seats INT Seats." in inherited
    assert parse_config(Trip, ["--vehicle", "tram", "--seats", "none"]) == Trip(vehicle="tram")
