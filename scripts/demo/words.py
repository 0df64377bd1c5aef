# ruff: noqa: E501, SIM905 (word lists are easiest to read and extend as one string)
"""The word lists of the demo world: who may appear in a story, with what, where. Data only; every
name is an everyday English word or first name, written down for this project."""

GIRLS = (
    "Anna Mia Lily Emma Zoe Ruby Nora Clara Ella Lucy Rosa Maya Alice Grace Ivy Hannah Sara Julia"
    " Eva Lena Tina Molly Daisy Kate Jane Amy Beth Nina Sophie Olive Hazel Iris Mary Ann Susan Wendy"
    " Holly Fiona Greta Heidi Lola Penny Tess Vera Willa Cora Dora Elsa Freya June"
).split()
BOYS = (
    "Tom Ben Max Sam Leo Jack Noah Finn Oscar Henry Adam Peter Paul Luke Owen Felix Hugo Theo Eli"
    " Ned Tim Jim Bob Dan Carl Erik Frank George Harry Ian Jonas Kevin Liam Mark Nick Otto Ralph"
    " Simon Toby Victor Walter Anton Bruno David Emil Fred Gus Hans Ivan Joe"
).split()
SURNAMES = (
    "Brown Green Hill Wood Baker Miller Stone Field Cook Fisher Gray White Bell King Young Lake"
    " Potter Carter Mason Rivers"
).split()
PETS = (
    "Biscuit Pepper Shadow Lucky Ginger Button Snowy Patch Coco Socks Misty Bandit Honey Rusty Tiger"
    " Muffin Pebble Cloudy Whiskers Bouncy Dusty Sparky Nutmeg Fluffy Spot Scout Poppy Cinnamon"
    " Marble Smoky"
).split()
# Pieces of made-up names, so that names nobody listed can be copied as well.
ONSETS = "b br c ch d dr f fl g gr h j k kr l m n p pr r s sh st t tr v w y z".split()
VOWELS = "a e i o u ai ee oa ia eo".split()
CODAS = " l n r s t m k nd th x rn ll".split(" ")

COLORS = "red blue green yellow orange purple pink brown black white silver golden".split()
SIZES = "small big little large tiny long old new shiny pretty".split()

# Things a child can own, lose, find, break, give and carry.
THINGS = (
    "kite ball doll boat drum hat scarf book lamp whistle basket bell flute key coin ring watch"
    " bucket shovel umbrella backpack blanket teddy wagon puzzle crown mask mirror necklace button"
    " feather marble pencil notebook camera compass lantern map bracelet mitten cap shoe sled"
    " skateboard robot puppet trumpet violin box cup bowl spoon jacket glove ribbon paintbrush"
    " telescope harmonica bottle wallet purse"
).split()
MENDABLE = {
    "kite": ("glue", "string"),
    "ball": ("a pump", "tape"),
    "doll": ("a needle", "glue"),
    "boat": ("wood", "glue"),
    "drum": ("tape", "a new skin"),
    "lamp": ("a new bulb", "wire"),
    "basket": ("straw", "string"),
    "wagon": ("a hammer", "a new wheel"),
    "robot": ("a screwdriver", "wire"),
    "sled": ("nails", "rope"),
    "umbrella": ("tape", "a needle"),
    "backpack": ("a needle", "a new zipper"),
    "violin": ("new strings", "glue"),
    "watch": ("tiny tools", "a new spring"),
    "puppet": ("string", "a needle"),
    "bucket": ("a new handle", "wire"),
    "lantern": ("new glass", "wire"),
    "telescope": ("new glass", "a screwdriver"),
    "box": ("nails", "glue"),
    "skateboard": ("a new wheel", "a screwdriver"),
    "bell": ("a hammer", "wire"),
    "bowl": ("glue", "paint"),
    "crown": ("glue", "golden paper"),
    "mask": ("paper", "paint"),
}
# place -> (preposition for being there, hiding spots that belong there)
PLACES = {
    "park": ("in", "under the bench|behind the tall tree|next to the swing|in the bushes"),
    "garden": ("in", "under the rose bush|behind the shed|near the gate|in the flower bed"),
    "forest": (
        "in",
        "under a pile of leaves|behind an old log|in a hollow tree|next to a big rock",
    ),
    "beach": ("at", "under the sand|behind a rock|in a small cave|next to a sandcastle"),
    "school": ("at", "under the desk|behind the door|on the top shelf|in the music room"),
    "market": ("at", "under the fruit stand|behind the bread cart|next to the well|in a crate"),
    "library": ("in", "between two books|under the big table|behind the shelf|on the window seat"),
    "farm": ("on", "in the hay|behind the barn|under the tractor|next to the chicken house"),
    "river": ("by", "under the bridge|in the tall grass|behind a willow|next to the dock"),
    "lake": ("at", "under the old pier|in the reeds|next to a rowboat|behind the cabin"),
    "playground": ("on", "under the slide|in the sandbox|next to the seesaw|behind the fence"),
    "station": ("at", "under the clock|behind the ticket desk|on the platform|next to the stairs"),
    "museum": ("in", "behind the big vase|under the stairs|next to the dinosaur|in the coat room"),
    "castle": ("in", "in the tower|under the throne|behind the curtain|next to the iron gate"),
    "meadow": ("in", "in the tall grass|next to the stream|under the oak|behind the stone wall"),
    "village": ("in", "next to the church|under the lamp post|behind the bakery|in the cart"),
    "bakery": ("in", "under the counter|behind the flour bags|next to the oven|on the bread rack"),
    "zoo": ("at", "next to the monkey house|under the sign|behind the pond|in the straw"),
    "harbor": ("at", "in a fishing net|under a barrel|behind the crates|next to the boats"),
    "hill": ("on", "behind the big stone|in a rabbit hole|under the pine tree|next to the path"),
    "attic": ("in", "in an old chest|behind the boxes|under a dusty cloth|next to the window"),
    "kitchen": ("in", "under the table|behind the stove|in the drawer|on the top shelf"),
    "barn": ("in", "in the hay|under the ladder|behind the cow|next to the door"),
    "orchard": ("in", "under the apple tree|in a basket|behind the wall|next to the ladder"),
    "square": ("in", "next to the fountain|under the cafe table|behind the statue|in the cart"),
    "bus": ("on", "under the seat|behind the driver|next to the window|in the luggage rack"),
    "shop": ("in", "under the counter|behind the door|on the shelf|next to the window"),
    "cave": ("in", "behind a flat stone|in a dark corner|next to a pool|under some moss"),
    "yard": ("in", "behind the shed|under the steps|in the tall grass|next to the fence"),
    "island": ("on", "under a palm tree|in the sand|behind a cliff|next to an old boat"),
}
OUTDOORS = (
    "park garden forest beach river lake playground meadow hill orchard yard island farm square"
).split()
HOMES = (
    "in a small house by the river|in a tall house near the park|in a cottage in the woods"
    "|on a farm near the hills|in a white house by the sea|in a flat above the bakery"
    "|in a little village|in a big city|in a house with a blue door|in a wooden cabin by the lake"
    "|on a quiet street|in a stone house on a hill|on a boat in the harbor|near the train station"
    "|next to the school|in a yellow house with a garden"
).split("|")
WEATHER = {
    "sunny": "The sun was shining.|It was a sunny day.|It was sunny and warm.",
    "rainy": "It was a rainy day.|Rain was falling on the roof. It was a rainy day.",
    "windy": "It was a windy day.|The wind was strong. It was a windy day.",
    "snowy": "It was a snowy day.|Snow lay on the ground. It was a snowy day.",
    "cloudy": "It was a cloudy day.|Gray clouds hung in the sky. It was a cloudy day.",
    "foggy": "It was a foggy day.|Fog lay over everything. It was a foggy day.",
}
TIMES = "morning afternoon evening".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBERS = "two three four five six seven eight nine ten".split()
FOODS = (
    "apple pie|chocolate cake|pancakes|vegetable soup|bread and honey|cookies|strawberries|cheese"
    "|warm rice|noodles|pizza|fried eggs|fish and chips|apples|pears|cherries|ice cream|popcorn"
    "|potato salad|cinnamon rolls|muffins|roasted nuts|toast with jam|tomato soup|blueberry pie"
    "|sandwiches|plum cake|carrot cake|corn bread|waffles"
).split("|")
DRINKS = "milk|hot chocolate|apple juice|lemonade|tea|cold water|orange juice|warm cider".split("|")
BAKED = {
    "apple pie": "apples flour butter sugar",
    "chocolate cake": "chocolate flour eggs sugar",
    "pancakes": "milk flour eggs butter",
    "vegetable soup": "carrots onions salt potatoes",
    "cookies": "butter sugar flour nuts",
    "carrot cake": "carrots eggs sugar nuts",
    "corn bread": "corn salt milk honey",
    "blueberry pie": "blueberries flour butter sugar",
    "waffles": "eggs milk sugar butter",
    "muffins": "flour raisins milk eggs",
    "tomato soup": "tomatoes onions salt cream",
    "plum cake": "plums flour eggs cinnamon",
    "potato salad": "potatoes onions vinegar salt",
    "cinnamon rolls": "cinnamon flour butter honey",
}
# Animals that can be a pet, and animals that can be met. Words give the sound they make.
PET_KINDS = "dog cat rabbit parrot hamster pony turtle goat duck kitten puppy mouse".split()
WILD = (
    (
        "fox owl squirrel hedgehog deer frog duckling lamb sparrow badger beaver raccoon bear cub"
        " goose swan piglet foal robin seal turtle rabbit mole crow kitten puppy"
    )
    .replace("bear cub", "bear")
    .split()
)
TRAPS = {
    "in a deep hole": "a rope|a ladder|a long branch",
    "in the mud": "a wooden board|a rope|a long branch",
    "in a net": "a knife|a pair of scissors",
    "under a fallen branch": "a saw|a strong stick",
    "on a high roof": "a ladder|a big blanket",
    "in an old well": "a bucket|a rope",
    "up in a tall tree": "a ladder|a big blanket",
    "behind a fence": "a saw|a pair of pliers",
    "on the thin ice": "a sled|a rope",
    "in a thorn bush": "a pair of gloves|a pair of scissors",
}
JOBS = (
    "baker|farmer|teacher|doctor|fisherman|gardener|painter|carpenter|shepherd|tailor|postman"
    "|librarian|cook|sailor|blacksmith|beekeeper|miller|clockmaker"
).split("|")
FEARS = {
    "the dark": "a lantern|a small lamp|a flashlight",
    "deep water": "a life vest|a swim ring|a float",
    "loud thunder": "a warm blanket|a pair of earmuffs|a soft pillow",
    "high places": "a safe rope|a strong helmet|a steady ladder",
    "big dogs": "a bone|a tasty biscuit|a little leash",
    "the old cellar": "a candle|a lantern|a flashlight",
    "spiders": "a glass jar|a book about spiders|a magnifying glass",
    "the first day of school": "a lucky coin|a lucky pebble|a friendly note",
}
SEEDS = (
    "sunflowers|pumpkins|carrots|tomatoes|beans|roses|tulips|strawberries|peas|melons|daisies|corn"
).split("|")
PESTS = "snails|birds|rabbits|ants|beetles|mice|crows|goats".split("|")
GUARDS = "a scarecrow|a little fence|a net|a row of bells|a wall of stones|a shiny ribbon".split(
    "|"
)
CONTESTS = {
    "race": "ran as fast as possible|running",
    "swimming race": "swam as fast as possible|swimming",
    "baking contest": "baked all morning|baking",
    "drawing contest": "drew with great care|drawing",
    "singing contest": "sang a beautiful song|singing",
    "sandcastle contest": "built a tall sandcastle|building",
    "boat race": "rowed with all strength|rowing",
    "spelling contest": "spelled long words|spelling",
    "jumping contest": "jumped very far|jumping",
    "kite contest": "let a kite fly high|flying kites",
    "chess contest": "thought about every move|playing chess",
}
PRIZES = (
    "a golden cup|a big cake|a book|a medal|a basket of fruit|a toy train|a silver coin|a blue ribbon"
    "|a box of paints|a new hat"
).split("|")
NOISES = (
    "a scratching noise|a loud bang|a soft cry|a strange whistle|a knocking sound|a deep hum"
).split("|")
NOISE_MAKERS = (
    "an owl|a hungry mouse|a little cat|a lost dog|a loose window|a raccoon|a branch|a hedgehog"
    "|a sleepy bat|a dripping pipe"
).split("|")
TREASURES = (
    "old coins|shiny stones|a pile of books|a silver crown|colored glass|a golden bell|an old letter"
    "|a box of toys|a bag of seeds|a tiny ship"
).split("|")
GAMES = "hide and seek|tag|ball|cards|chess|marbles|catch|checkers|pirates|hopscotch".split("|")
VEHICLES = "bus|train|boat|wagon|bicycle|car|sled|cart".split("|")
SHELTERS = "a cave|an old barn|a little hut|a bus stop|a church|a tent|a bakery|a mill".split("|")
MATERIALS = "paper|wood|clay|wool|leather|straw|shells|tin".split("|")
OCCASIONS = "birthday|wedding day|name day|first day at work|last day of school".split("|")
MAKES = "card|bracelet|picture|boat|bowl|scarf|lantern|puppet|basket|box|necklace|hat".split("|")
LESSONS = {
    "friends": "It is good to have friends.|A good friend is a treasure.|Friends help each other.",
    "sharing": "Sharing makes everyone happy.|It is better to share than to fight.",
    "patience": "Good things take time.|With patience you can do great things.",
    "courage": "Being brave means trying even when you are afraid.|A little courage goes far.",
    "kindness": "A kind word can change the whole day.|Kindness always comes back.",
    "care": "Take good care of your things.|It pays to be careful.",
    "work": "Hard work brings its reward.|Practice makes you better.",
}
FLOWERS = ("sunflowers", "roses", "tulips", "daisies")
# Places one travels to.
GOALS = (
    "park forest beach library farm river lake museum castle meadow village zoo harbor hill market"
    " orchard cave island"
).split()
# Things one is sent to bring to somebody.
PARCELS = "letter parcel message box basket book cake jar hat coat bottle map ring".split()
