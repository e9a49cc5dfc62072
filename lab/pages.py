"""One page in English and the same page in Korean, paragraph by paragraph: how a tide mill works.

Written for this study, so that no model or tokenizer has read them.
"""

ENGLISH = (
    "A tide mill grinds grain with the water that the sea lifts twice a day. It needs no river and no wind, only a bay with "
    "a narrow mouth and a shore where high and low water lie a few metres apart. Such mills stood on many coasts, and some "
    "of them worked for several hundred years without a change in their plan.",
    "The builder first closes part of the bay with a dam. Behind the dam lies the mill pond. A gate in the dam hangs from a "
    "hinge at its upper edge and opens only inwards. When the tide rises, the water pushes the gate open and flows into the "
    "pond; when the tide begins to fall, the full pond presses the gate shut by itself.",
    "Now the miller has to wait. The wheel stands in a channel below the mill, and as long as the sea is high its lower half "
    "is under water and cannot turn. After two or three hours the sea has gone down far enough. The miller raises a small "
    "door, the pond runs out through the channel, and the wheel begins to move.",
    "Inside the house a large wooden wheel sits on the same shaft. Its teeth grip the bars of a smaller wheel that lies "
    "flat, so that the slow turning of the water wheel becomes the quick turning of an upright post. On that post rests the "
    "upper millstone, as heavy as a horse, and below it lies a second stone that never moves.",
    "The grain falls from a wooden funnel into a hole in the upper stone. Furrows cut into both stones carry it outwards and "
    "tear it finer and finer, until flour runs over the edge into a trough. If the stones stand too close, they grow hot and "
    "spoil the flour; if they stand too far apart, the grain comes out whole.",
    "A day at the mill follows the moon and not the clock. Each tide comes about fifty minutes later than the one of the day "
    "before, so the miller may work at noon in one week and at midnight in the next. At full moon and at new moon the pond "
    "fills highest, and then there is bread for the whole village.",
    "The sea also brings trouble. Mud settles in the pond and has to be dug out every few years, worms bore into the wood of "
    "the gate, and a storm can break the dam in one night. Many owners gave up when steam engines could grind at any hour, "
    "and their ponds were filled with earth or turned into harbours.",
    "Today a few tide mills run again for visitors. Engineers have taken up the idea as well: a long dam across a river "
    "mouth can drive turbines instead of stones and send electric current to a town. The principle is the old one, to hold "
    "the water while it is high and to let it go when the sea is low.",
)
"""Paragraphs in English."""

KOREAN = (
    "조수 방앗간은 바다가 하루에 두 번 들어 올리는 물로 곡식을 빻는다. 강도 바람도 필요 없고, 어귀가 좁은 만과 밀물과 "
    "썰물의 높이가 몇 미터쯤 차이 나는 바닷가만 있으면 된다. 이런 방앗간은 여러 해안에 서 있었고, 그중 몇몇은 처음의 "
    "설계를 바꾸지 않은 채 수백 년 동안 돌아갔다.",
    "짓는 사람은 먼저 둑으로 만의 한쪽을 막는다. 둑 뒤에 방앗간 못이 생긴다. 둑에 난 문은 위쪽 모서리의 경첩에 매달려 "
    "있어서 안쪽으로만 열린다. 물이 차오르면 바닷물이 문을 밀어 열고 못으로 흘러들고, 물이 빠지기 시작하면 가득 찬 못이 "
    "저절로 문을 눌러 닫는다.",
    "이제 방앗간 주인은 기다려야 한다. 물레바퀴는 방앗간 아래 물길에 서 있는데, 바다가 높은 동안에는 아래쪽 절반이 물에 "
    "잠겨 돌지 못한다. 두세 시간이 지나면 바다가 충분히 내려간다. 주인이 작은 수문을 들어 올리면 못의 물이 물길로 빠져나가고 "
    "바퀴가 움직이기 시작한다.",
    "집 안에는 같은 굴대에 커다란 나무 바퀴가 달려 있다. 그 톱니가 눕혀 놓은 작은 바퀴의 살을 물어서, 물레바퀴의 느린 "
    "회전이 곧게 선 기둥의 빠른 회전으로 바뀐다. 그 기둥 위에는 말 한 마리만큼 무거운 위짝 맷돌이 얹혀 있고, 그 밑에는 "
    "결코 움직이지 않는 아래짝이 놓여 있다.",
    "곡식은 나무 깔때기에서 위짝의 구멍으로 떨어진다. 두 돌에 새긴 홈이 곡식을 바깥으로 나르면서 점점 더 잘게 부수고, "
    "마침내 가루가 가장자리를 넘어 통으로 흘러내린다. 돌이 너무 가까우면 뜨거워져 가루를 망치고, 너무 멀면 곡식이 통째로 "
    "나온다.",
    "방앗간의 하루는 시계가 아니라 달을 따른다. 밀물은 날마다 전날보다 오십 분쯤 늦게 오기 때문에, 주인은 어떤 주에는 "
    "한낮에 일하고 다음 주에는 한밤중에 일한다. 보름과 그믐에는 못이 가장 높이 차고, 그때는 온 마을이 먹을 빵이 나온다.",
    "바다는 골칫거리도 가져온다. 못에는 진흙이 쌓여 몇 해마다 파내야 하고, 벌레가 문의 나무를 파고들며, 폭풍은 하룻밤에 "
    "둑을 무너뜨릴 수 있다. 증기 기관이 아무 때나 곡식을 빻게 되자 많은 주인이 일을 그만두었고, 그들의 못은 흙으로 메워지거나 "
    "항구가 되었다.",
    "오늘날 몇몇 조수 방앗간은 구경꾼을 위해 다시 돌아간다. 기술자들도 이 생각을 이어받았다. 강어귀를 가로지르는 긴 둑은 "
    "맷돌 대신 터빈을 돌려 도시로 전기를 보낼 수 있다. 원리는 옛날과 같다. 물이 높을 때 가두어 두었다가 바다가 낮을 때 "
    "내보내는 것이다.",
)
"""The same paragraphs in Korean."""

PAGES = {"english": ENGLISH, "korean": KOREAN}
