"""Lists the words that made-up text consists of: short, common, lower-case, no inflections."""

import random

_LIST = """
able acid angel anger apple april arch army arrow autumn baby back bank barn basket battle beach
bear beauty bell bench bird bishop blood blue boat bone book boot bottle bowl brain branch brass
bread breath brick bridge bright broad bronze brother brown bush butter cabin calm camel camp
candle canvas captain card carpet castle cattle chain chair chalk chance cheese cherry chest
child church circle citizen city clay clear clock cloth cloud coach coal coast coffee coin cold
colour copper coral corn corner cotton cousin crane cream crowd crown crystal dark dawn deep
deer desert desk diamond dinner doctor dog door dragon dream dress dust eagle early earth east
egg elbow empty engine evening eye face falcon farm farmer father feather fence field fig finger
fire fish flame flower flute forest fork fort fountain fox fresh friend frost fruit garden gate
gentle giant glass glory glove goat gold grain grape grass gravel gray green guard guest guitar
hall hammer hand harbor hat hawk hazel heart heaven heavy hedge herb hero hill hollow honest
honey horn horse hotel house hunter ice idea iron island ivory jacket jewel journey judge juice
kettle key king kitchen kite knee knife ladder lady lake lamb lamp lantern large lawyer leaf
leather lemon letter light lily lime linen lion lonely lord lotus lunch magnet maple marble
market meadow medal melon merchant metal milk mill mirror monkey moon morning moss mother mount
mouse mouth music narrow needle nest night noble noise north nose number nurse oak ocean office
olive orange orchard oven owl paint palace palm paper parrot path peach pear pearl pebble pepper
piano picture pigeon pilot pine pipe plain planet plate plum pocket poem poet pond porch potato
priest prince purple quail queen quiet quilt rabbit rain raven reader ribbon rice ring river
road robin rock roof room root rope rose rough ruby sail salmon salt sand school scissors sea
season secret servant shadow shell shepherd ship shirt shore short sister silent silver simple
sleep slow smoke snow soft soldier song soup south spice spider spirit spoon spring square
squire stable star station stone storm story stove straw stream street sugar summer sun swan
sword table tailor tall temple thick thin thorn thread tiger timber tower town train tree
trumpet tulip tunnel turtle uncle valley vast velvet village violet violin visitor voice wagon
wall walnut warm watch water wave wax west whale wheat wheel whisper white wide widow wild
willow wind window wine winter wise wolf wood wool yard yellow young
"""

WORDS: tuple[str, ...] = tuple(_LIST.split())


def word_pairs(count: int, rng: random.Random) -> list[str]:
    """``count`` different pairs of words such as ``oak-lion``."""
    numbers = rng.sample(range(len(WORDS) ** 2), count)
    return [f"{WORDS[n // len(WORDS)]}-{WORDS[n % len(WORDS)]}" for n in numbers]
