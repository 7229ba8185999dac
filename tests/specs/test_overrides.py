"""The override grammar: what each text means, and that everything else is refused in words."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lambda_hat.specs.overrides import MAX_VALUES, Assignment, Table, parse, parse_sweep, plain
from lambda_hat.specs.spec import InvalidInput


@pytest.mark.parametrize(
    ("text", "path", "values"),
    [
        ("a=1", ("a",), (1,)),
        ("a=-3", ("a",), (-3,)),
        ("model.depth=3,4", ("model", "depth"), (3, 4)),
        ("sampler.sgld-adam.step_size=1e-5,.5,2.", ("sampler", "sgld-adam", "step_size"), (1e-5, 0.5, 2.0)),
        ("a=true,False", ("a",), (True, False)),
        ("a=none,null", ("a",), (None, None)),
        ("target=mlp-small,dln", ("target",), ("mlp-small", "dln")),
        ("seed=range(1,4)", ("seed",), (1, 2, 3)),
        ("seed=range(6, 0, -2)", ("seed",), (6, 4, 2)),
        ("seed=range(0,2),7", ("seed",), (0, 1, 7)),
        ("eta=2**range(-2,3)", ("eta",), (0.25, 0.5, 1, 2, 4)),
        ("eta=1e-3, 2 ** range (1,3),2**-3,0.5**2", ("eta",), (1e-3, 2, 4, 0.125, 0.25)),
        ("w=[5,10,5]", ("w",), ((5, 10, 5),)),
        ("w=[5,3,5],[10,10]", ("w",), ((5, 3, 5), (10, 10))),
        ("w=[]", ("w",), ((),)),
        ("w=[],[1,[]]", ("w",), ((), (1, ()))),
        ("w=[[1,2],[3]]", ("w",), (((1, 2), (3,)),)),
        ("w=[a,true,1e-2]", ("w",), (("a", True, 0.01),)),
        (" a . b = 1 , 2 ", ("a", "b"), (1, 2)),
        ("a=1,1,2,1", ("a",), (1, 1, 2, 1)),
        ("a=1,1.0,true", ("a",), (1, 1.0, True)),
        ("a='1','x, [y]=z',\"it's\"", ("a",), ("1", "x, [y]=z", "it's")),
        ("a=''", ("a",), ("",)),
        ("a=./data/x.csv", ("a",), ("./data/x.csv",)),
        ("a=1e,nan,ranger", ("a",), ("1e", "nan", "ranger")),
        ("a={b=1, c='x, y'}", ("a",), (Table((("b", 1), ("c", "x, y"))),)),
        ("a={},{b=mod:f}", ("a",), (Table(()), Table((("b", "mod:f"),)))),
    ],
)
def test_grammar(text, path, values):
    assignment = parse(text)
    assert assignment == Assignment(path, values, text)
    assert [type(value) for value in assignment.values] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no '='"),
        ("model.depth", "no '='"),
        ("=3", "a key is names joined by dots"),
        ("a..b=3", "a key is names joined by dots"),
        ("a b=3", "'a b'"),
        ("3=3", "a key is names joined by dots"),
        ("a=", "an item is empty"),
        ("a=1,,2", "an item is empty"),
        ("a=1,", "an item is empty"),
        ("a=[1,]", "an item is empty"),
        ("a=[,1]", "an item is empty"),
        ("a=]", "an item is empty"),
        ("a=[1,2", "a comma or ] must follow an item; got the end"),
        ("a=1]", "must follow an item; got ']'"),
        ("a=[1 2]", "must follow an item; got '2'"),
        ("a='x", "is no value"),
        ("a=b=c", "a comma or the end must follow an item; got '='"),
        ("a=(1,2)", "is no value"),
        ("a=0**range(1,3)", "a power is of a positive number"),
        ("a=x**range(1,3)", "a power is of a positive number"),
        ("a=2**99999", "at most 300 digits; got 2**99999"),
        ("a=2**range(3)", "two or three integers; got range(3)"),
        ("a=[2**range(1,3)]", "cannot stand in a list"),
        ("a=range(1,4,0)", "step of a range must not be 0"),
        ("a=range(1,2.5)", "two or three integers; got range(1,2.5)"),
        ("a=range(3)", "two or three integers"),
        ("a=range(3,1)", "range(3,1) is empty"),
        ("a=range(1,4", "a comma or the end must follow an item; got '('"),
        ("a=[range(1,4)]", "cannot stand in a list"),
        (f"a=range(0,{MAX_VALUES + 1})", "at most 10000 values"),
        ("a=" + "9" * 5000, "at most 300 digits"),
        ("a=" + "[" * 5000, "nest at most 8 deep"),
        ("a=" + "{b=" * 5000, "nest at most 8 deep"),
        ("a={b=1", "a comma or } must follow an item; got the end"),
        ("a={b=1]", "a comma or } must follow an item; got ']'"),
        ("a={b=1 c=2}", "a comma or } must follow an item; got 'c'"),
        ("a={b=}", "an item is empty"),
        ("a={b=1,}", "a table is {name=value, ...}; got '}'"),
        ("a={1}", "a table is {name=value, ...}; got '1}'"),
        ("a={'b c'=1}", "a table is {name=value, ...}"),
        ("a={\"b'=1}", "a table is {name=value, ...}"),
        ("a={b=1, b=2}", "a table sets a name once; got 'b' twice"),
        ("a={b=range(1,3)}", "cannot stand in a list or a table"),
        ("a=b}", "a comma or the end must follow an item; got '}'"),
        ("a={b=1}{b=2}", "a comma or the end must follow an item; got '{'"),
    ],
)
def test_malformed(text, words):
    with pytest.raises(InvalidInput) as error:
        parse(text)
    assert words in str(error.value)
    assert (repr(text) if len(text) <= 160 else repr(text)[:121]) in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "u=[{p='1+1=', n=[1, 2], t={x=true, y=none}}, {}], {p=1e-2}",
        'u=[{"p": "1+1=", "n": [1, 2], "t": {"x": true, "y": null}}, {}], {"p": 1e-2}',
        "u = [ { p:'1+1=',n : [1,2] , t={x:true,y=null} } , { } ],{ p = 1e-2 }",
    ],
)
def test_tables_are_those_of_toml_and_of_json(text):
    assignment = parse(text)
    assert [plain(value) for value in assignment.values] == [
        [{"p": "1+1=", "n": [1, 2], "t": {"x": True, "y": None}}, {}], {"p": 0.01},
    ]  # fmt: skip
    assert hash(assignment) == hash(parse(text))


def test_key_once_in_a_sweep():
    assert list(parse_sweep(["a=1", "a.b=2"])) == [("a",), ("a", "b")]
    with pytest.raises(InvalidInput, match=r"a = 2.*sets a key once; 'a=1' sets it too\. Join the values"):
        parse_sweep(["a=1", "b=2", "a = 2"])


@given(st.text() | st.text("ab.=,[]{}:()'\"range19e-+ \n").map(lambda text: f"a={text}"))
@example("a=range(1,99999999999999999999)")
@example("a=\x00")
@example("a=١")
def test_parse_raises_nothing_but_invalid_input(text):
    try:
        assignment = parse(text)
    except InvalidInput:
        return
    assert assignment.values
    assert assignment.path
