"""Which URLs may be fetched, and in what form they are compared. What is refused before anything is connected to: test_fetch.py."""

import json
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from serve.errors import ApiError
from serve.urls import FetchSettings, canonical, parse

SHOP = FetchSettings(hosts=("shop.test", "*.cdn.test"), max_redirects=3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hosts": ("*",)}, "host name"),
        ({"hosts": ("*.test",)}, "too much"),
        ({"hosts": ("*.*.test",)}, "host name"),
        ({"hosts": ("a.*.test",)}, "host name"),
        ({"hosts": ("https://shop.test",)}, "neither a host name"),
        ({"hosts": ("shop.test:443",)}, "neither a host name"),
        ({"hosts": ("",)}, "host name"),
        ({"hosts": ("*.0.0.1",)}, "octets"),
        ({"hosts": ("127.1",)}, "octets"),
        ({"schemes": ("ftp",)}, "schemes"),
        ({"ports": (0,)}, "ports"),
        ({"ports": (65_536,)}, "ports"),
        ({"max_redirects": 4}, "max_redirects"),
        ({"timeout_s": float("inf")}, "timeout_s"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"proxy": "x"}, "proxy"),
    ],
)
def test_settings_that_cannot_be_meant_are_errors(change, said):
    with pytest.raises(ValidationError, match=said):
        FetchSettings(**change)


def test_settings_are_compared_in_the_form_that_urls_are():
    settings = FetchSettings(hosts=("SHOP.Test.", "*.B\u00fccher.test", "2606:4700:0:0::1111"))
    assert settings.hosts == ("shop.test", "*.xn--bcher-kva.test", "2606:4700::1111")
    assert parse("https://shop.TEST./a", settings).host == "shop.test"
    assert parse("https://img.b\u00fccher\u3002test/a", settings).host == "img.xn--bcher-kva.test"
    assert parse("https://[2606:4700::0:1111]/a", settings).authority == "[2606:4700::1111]"
    with pytest.raises(ValidationError):
        settings.hosts = ()


@given(st.one_of(st.text(), st.from_regex(r"https?://[a-z0-9.@:\[\]%\\/#?]{0,20}(shop\.test|a\.cdn\.test)[a-z0-9.@:\[\]%\\/#?]{0,20}")))
@example("https://shop.test:443/@x")
def test_what_is_accepted_has_a_listed_host_to_every_parser(url):
    try:
        target = parse(url, SHOP)
    except ApiError as error:
        event(error.code)
        return
    assert target.host == "shop.test" or target.host.endswith(".cdn.test")
    assert httpx.URL(target.url).host == urlsplit(target.url).hostname == target.host == canonical(target.host)
    assert parse(target.url, SHOP) == target


def test_settings_go_through_json():
    assert FetchSettings(**json.loads(SHOP.model_dump_json())) == SHOP
